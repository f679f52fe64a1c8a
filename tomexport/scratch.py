"""Scratch folders that are gone afterwards, however the process ends."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_open: set[Path] = set()


@contextlib.contextmanager
def folder(beside: Path) -> Iterator[Path]:
    """Give a hidden folder beside a file, on the same disk.

    Raises: OSError if it cannot be made.
    """
    path = Path(tempfile.mkdtemp(prefix=f".{beside.stem}.", dir=beside.parent))
    _open.add(path)
    try:
        yield path
    finally:
        _remove(path)


def abandon() -> None:
    """Remove every folder that is still open: for a process about to end at once."""
    for path in list(_open):
        _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _open.discard(path)
