"""Where built kernels lie: one folder each, named after all that the result depends on.

    ~/.cache/tomexport/onnxruntime-1.31.1-native-0123456789abcdef/
        libtomexport_onnxruntime.so    absent if the build failed
        tomexport-kernels.json         what it is, or why it failed
        build.log

What lies there runs as the user, so a cache that others could write to is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tomexport import scratch
from tomexport.errors import BuildError

try:
    import fcntl
except ImportError:  # no such locks on Windows: there, processes work side by side
    fcntl = None  # type: ignore[assignment]

LOG = "build.log"
_RECORD, _SCRATCH = "tomexport-kernels.json", "tomexport-kernels"


@dataclass(frozen=True)
class Library:
    """A library, or the record of a build that failed.

    Attributes:
        path: where it lies.
        runtime, version, march: what it is for.
        system: where it was built, "Linux x86_64" for instance.
        compiler: what the compiler says of itself, or the toolchain file.
        built: when, UTC, ISO 8601.
        size: bytes.
        error: why the build failed; None if it did not.
    """

    path: Path
    runtime: str
    version: str
    march: str
    system: str
    compiler: str
    built: str
    size: int
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON data."""
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def require(self) -> Library:
        """Pass on a library that was built.

        Raises: BuildError for one that was not.
        """
        if self.error:
            raise BuildError(
                f"Fused kernels for {self.runtime} {self.version} could not be built: "
                f"{self.error}. The log is {self.path.parent / LOG}; `tomexport kernels build` "
                "tries again."
            )
        return self


def folder() -> Path:
    """Return the cache, whether it is there or not.

    Raises: BuildError if others could have put something into it.
    """
    own, shared = os.environ.get("TOMEXPORT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    path = Path(own) if own else Path(shared or "~/.cache", "tomexport")
    try:
        path = path.expanduser().absolute()
    except RuntimeError as err:
        raise BuildError("There is no home folder for a cache; set TOMEXPORT_CACHE.") from err
    _require_own(path)
    return path


def get(entry: Path) -> Library | None:
    """Return what was put there, a failure too; None for nothing, or for what is not whole.

    Raises: BuildError if others could have put it there.
    """
    try:
        record = json.loads((entry / _RECORD).read_text("utf-8"))
        found = Library(**record | {"path": entry / record["path"]})
        whole = found.error is not None or found.path.stat().st_size == found.size
    except (OSError, ValueError, TypeError, KeyError):
        return None
    _require_own(entry)
    _require_own(found.path)
    return found if whole else None


def put(made: Library, entry: Path) -> Library:
    """Move the folder of a library into its place, by renaming it.

    Of a failure only the log is kept where there is a library: what works is not lost to a compiler
    that has stopped to.
    """
    new = made.path.parent
    if made.error and (earlier := get(entry)) and not earlier.error:
        sync(new / LOG)
        (new / LOG).replace(entry / LOG)
        return dataclasses.replace(made, path=entry / made.path.name)
    (new / _RECORD).write_text(json.dumps(made.to_dict() | {"path": made.path.name}), "utf-8")
    for file in new.iterdir():
        sync(file)
    if entry.exists():
        entry.rename(new.with_name("old"))
    new.rename(entry)
    return dataclasses.replace(made, path=entry / made.path.name)


def stored() -> tuple[Library, ...]:
    """Return all that the cache holds, failures too.

    Raises: BuildError if the cache must not be trusted.
    """
    entries = (get(record.parent) for record in sorted(folder().glob(f"*/{_RECORD}")))
    return tuple(found for found in entries if found)


def clean() -> tuple[int, int]:
    """Remove all that the cache holds; return the number of its folders and their bytes.

    Raises: BuildError if the cache cannot be used.
    """
    if not folder().exists():
        return 0, 0
    with workshop():
        entries = [record.parent for record in folder().glob(f"*/{_RECORD}")]
        size = sum(file.stat().st_size for entry in entries for file in entry.iterdir())
        for entry in entries:
            shutil.rmtree(entry)
    return len(entries), size


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """Give a scratch folder in the cache to one process at a time.

    What a killed process left there is removed.

    Raises: BuildError for whatever the system refuses.
    """
    cache = folder()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (cache / ".lock").open("a") as file, _flock(file) as locked:
            for left in cache.glob(f".{_SCRATCH}.*") if locked else ():
                shutil.rmtree(left, ignore_errors=True)
            with scratch.folder(cache / _SCRATCH) as path:
                yield path
    except OSError as err:
        where = f" ({err.filename})" if err.filename else ""
        raise BuildError(
            f"The kernels could not be written in {cache}: {err.strerror or err}{where}. Set "
            "TOMEXPORT_CACHE to a folder that you can write to."
        ) from err


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """Let one process of this machine after the other do something, such as timing.

    Raises: BuildError if the cache cannot be used.
    """
    cache = folder()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (cache / f".{what}.lock").open("a")
    except OSError as err:
        raise BuildError(
            f"{cache} cannot be written to: {err.strerror or err}. Set TOMEXPORT_CACHE to a folder "
            "that can."
        ) from err
    with file, _flock(file):
        yield


@contextlib.contextmanager
def _flock(file: IO[str]) -> Iterator[bool]:
    """Hold a lock until the block ends; tell whether there are locks here."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX)
    yield fcntl is not None


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _require_own(path: Path) -> None:
    try:
        status = path.stat()
    except OSError:
        return  # nothing can be loaded from it
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise BuildError(
            f"{path} is not yours alone: others could put code there that runs as you. Set "
            "TOMEXPORT_CACHE to a folder that only you can write to."
        )
