"""What commands put on the screen: the result on stdout, all else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

_LOG_EVERY_S = 60.0


def show_result(
    data: dict[str, Any], as_json: bool, render: Callable[[Any], RenderableType], width: int = 80
) -> None:
    """Print a result: the one thing that goes to stdout."""
    if as_json:
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    from tomexport import tables

    console = Console(highlight=False, markup=False)
    console.width = max(console.width, width if console.is_terminal else 160)  # no digit is cut off
    console.print(render(tables), soft_wrap=not console.is_terminal)  # nor is a path broken


def show_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


@contextmanager
def progressing() -> Iterator[Callable[[str], None]]:
    """Show what is being done until it is done: on a terminal always, in a log now and then."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def say(message: str) -> None:
            nonlocal said
            if time.monotonic() - said >= _LOG_EVERY_S:
                said = time.monotonic()
                click.echo(message, err=True)

        yield say
        return
    from rich.console import Console

    with Console(stderr=True).status("…") as status:
        yield lambda message: status.update(message)
