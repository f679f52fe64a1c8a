"""Scratch folders and processes that are gone afterwards, however the process ends."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

NOTHING = "nothing was left behind"
_last_words = [NOTHING]
_open: set[Path] = set()
_running: set[subprocess.Popen[str]] = set()


@contextlib.contextmanager
def folder(beside: Path) -> Iterator[Path]:
    """Give a hidden folder beside a file, on the same disk.

    Raises: OSError if it cannot be made.
    """
    path = beside.parent / f".{beside.stem}.{secrets.token_hex(8)}"
    _open.add(path)  # before it is there: a signal may come right after
    try:
        path.mkdir(mode=0o700)
        yield path
    finally:
        _remove(path)


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process that reads and writes lines; it is killed when the block ends."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends its children
    )
    _running.add(child)
    try:
        yield child
    finally:
        child.kill()  # ends a stopped process too
        child.communicate()
        _running.discard(child)


def farewell(words: str) -> None:
    """Say what is left, should the process be interrupted now."""
    _last_words[0] = words


def last_words() -> str:
    """Return what to say when interrupted."""
    return _last_words[0]


def abandon() -> None:
    """Remove every folder and end every process: for a process about to end at once."""
    for child in list(_running):
        child.kill()
    for path in list(_open):
        _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _open.discard(path)
