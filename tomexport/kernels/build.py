"""The fused kernels as a library, built by CMake on the machine that runs them, once.

Sessions ask `library` for it. It lies in a cache, in a folder named after all that the result
depends on, so that whatever changes, the next session builds anew:

    ~/.cache/tomexport/onnxruntime-1.31.1-native-0123456789abcdef/
        libtomexport_onnxruntime.so    absent if the build failed
        tomexport-kernels.json         what it is, or why it failed
        build.log

What lies there runs as the user, so a cache that others could write to is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tomexport import scratch
from tomexport.errors import BuildError

try:
    import fcntl
except ImportError:  # no such locks on Windows: there, processes may build side by side
    fcntl = None  # type: ignore[assignment]

KERNELS = Path(__file__).parent
RUNTIMES = ("onnxruntime", "openvino")
_RECORD, _LOG, _SCRATCH = "tomexport-kernels.json", "build.log", "tomexport-kernels"
_ERROR = re.compile(r"(?m)^.*\berror: .*$|^CMake Error.*(?:\n\s+.*)?")
_VARIABLES = ("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_TOOLCHAIN_FILE")  # that CMake heeds


@dataclass(frozen=True)
class Target:
    """What a library is built for.

    Attributes:
        runtime: "onnxruntime" or "openvino".
        version: its release; None with a toolchain, whose own it is.
        march: architecture, as the compiler's -march takes it.
        toolchain: CMake's toolchain file for another machine; None is this one.
    """

    runtime: str
    version: str | None
    march: str = "native"
    toolchain: Path | None = None


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


@functools.cache
def tell(message: str) -> None:
    """Say something on stderr, once; the logger "tomexport" can send it elsewhere."""
    logging.getLogger("tomexport").warning("tomexport: %s", message)


def library(runtime: str, version: str) -> Path:
    """Return the library for a runtime of this machine; build it if it is not there yet.

    Raises: BuildError if it cannot be built, or was not before, or must not be trusted.
    """
    if not (found := find(runtime, version)):
        tell(f"building fused kernels for {runtime} {version}, once (about 10 s) …")
        with _locked():  # whoever waited here finds what the other has built
            target = Target(runtime, version)
            found = find(runtime, version) or _succeeded(_build(target, _entry(target)))
    return found.path


def find(runtime: str, version: str) -> Library | None:
    """Return what `library` would, or None if it would have to build first.

    Raises: BuildError as `library` does.
    """
    found = _read(_entry(Target(runtime, version)))
    if found and _succeeded(found):
        _require_own(found.path.parent)
        _require_own(found.path)
    return found


def build(target: Target, out: Path | None = None) -> Library:
    """Build a library anew: into the cache, or as one file for another machine.

    Args:
        target: what for.
        out: the folder of that file; None is the cache.

    Raises: BuildError with the first error of the build, or if another machine has no `out`.
    """
    if out is None and target != Target(target.runtime, target.version):
        raise BuildError(
            "The cache holds libraries for this machine only. With --march or --toolchain, say "
            "where the file goes: --out DIR."
        )
    if out is not None and not out.is_dir():
        raise BuildError(f"There is no folder {out} for the library; make it first.")
    if target.toolchain and not target.toolchain.is_file():
        raise BuildError(f"There is no toolchain file {target.toolchain}. Check the path.")
    if not re.fullmatch(r"[\w.+-]+", target.march):
        raise BuildError(
            f"{target.march!r} is no architecture; name one as the compiler does, armv8.2-a or "
            "x86-64-v3 for instance."
        )
    entry = _entry(target)
    tell(f"building fused kernels for {target.runtime} {target.version or target.march} …")
    with _locked():
        return _succeeded(_build(target, entry, out))


def stored() -> tuple[Library, ...]:
    """Return all that the cache holds, failed builds too.

    Raises: BuildError if the cache must not be trusted.
    """
    entries = (_read(record.parent) for record in sorted(cache().glob(f"*/{_RECORD}")))
    return tuple(found for found in entries if found)


def clean() -> tuple[int, int]:
    """Remove all that the cache holds; return the number of entries and their bytes.

    Raises: BuildError if the cache cannot be used.
    """
    if not cache().exists():
        return 0, 0
    with _locked():
        entries = [record.parent for record in cache().glob(f"*/{_RECORD}")]
        size = sum(file.stat().st_size for entry in entries for file in entry.iterdir())
        for entry in entries:
            shutil.rmtree(entry)
    return len(entries), size


def cache() -> Path:
    """Return the cache folder, whether it is there or not.

    Raises: BuildError if others could have put something into it.
    """
    own, shared = os.environ.get("TOMEXPORT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    path = Path(own) if own else Path(shared or "~/.cache", "tomexport")
    try:
        path = path.expanduser().absolute()
    except RuntimeError as err:
        raise BuildError("There is no home folder for the cache; set TOMEXPORT_CACHE.") from err
    _require_own(path)
    return path


def tools() -> dict[str, str | None]:
    """Return the paths of the compiler and of CMake; None for what is not here."""
    named = os.environ.get("CXX", "").split()[:1]
    beside = str(Path(sys.executable).parent)  # where pip puts its own cmake
    return {
        "c++": next(filter(None, map(shutil.which, named or ("c++", "g++", "clang++"))), None),
        "cmake": shutil.which("cmake") or shutil.which("cmake", path=beside),
    }


def _entry(target: Target) -> Path:
    """Return the folder in the cache that a target belongs in."""
    files = (p for p in KERNELS.rglob("*") if p.suffix in (".h", ".cpp", ".txt"))
    ingredients = {
        "sources": {str(p.relative_to(KERNELS)): p.read_text("utf-8") for p in files},
        "compiler": _compiler(target),
        "variables": [os.environ.get(name) for name in _VARIABLES],
        "march": [target.march, _processor() if target.march == "native" else None],
        "runtime": [target.runtime, target.version],
        "machine": [platform.system(), platform.machine()],
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    return cache() / f"{target.runtime}-{target.version}-{target.march}-{digest[:16]}"


def _compiler(target: Target) -> str:
    """Return what tells one compiler from another.

    Raises: BuildError if there is none, or no CMake.
    """
    found = tools() | ({"c++": "the toolchain's"} if target.toolchain else {})
    if missing := [name for name, path in found.items() if path is None]:
        raise BuildError(
            f"Fused kernels for {target.runtime} cannot be built here, for want of "
            f"{' and '.join(missing)}: apt install g++ cmake, or pip install cmake."
        )
    if target.toolchain:
        return target.toolchain.read_text("utf-8", errors="replace")
    command = [str(found["c++"]), *os.environ.get("CXX", "").split()[1:], "--version"]
    asked = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return f"{asked.stdout.strip()}\n{command[0]}"


def _processor() -> str:
    """Return what `native` means here: a home folder may be shared by unlike machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = re.findall(r"(?m)^(?:model name|flags|Features|CPU part|isa)\s*:.*$", text)
    return "\n".join(sorted(set(lines)))


def _build(target: Target, entry: Path, out: Path | None = None) -> Library:
    """Put a library, or the record of its failure, in its place: whole, by a rename."""
    with scratch.folder(entry.parent / _SCRATCH) as folder:
        made = _make(target, folder / "new", folder / "build")
        if out and not made.error:
            return _deliver(made, out)
        if entry.exists():
            entry.rename(folder / "old")
        (folder / "new").rename(entry)
    return dataclasses.replace(made, path=entry / made.path.name)


def _make(target: Target, folder: Path, workshop: Path) -> Library:
    """Compile into a new folder, with the record and the log."""
    folder.mkdir(mode=0o700)
    cmake = str(tools()["cmake"])
    configure = [cmake, "-S", str(KERNELS / "native"), "-B", str(workshop), *_settings(target)]
    error = _first_error((configure, [cmake, "--build", str(workshop)]), folder / _LOG)
    path, size = folder / f"libtomexport_{target.runtime}", 0
    stated = workshop / "version"  # the release that CMake found, or those that will do
    if not error:
        built = next(workshop.glob(f"libtomexport_{target.runtime}.*"))
        path = folder / built.name
        built.chmod(0o700)
        built.rename(path)
        _sync(path)
        size = path.stat().st_size
    elif target.toolchain and target.runtime == "openvino":
        error += (
            " (for another machine, CMAKE_PREFIX_PATH or OpenVINO_DIR in the toolchain file must "
            "lead to that machine's OpenVINO)"
        )
    made = Library(
        path=path,
        runtime=target.runtime,
        version=target.version or (stated.read_text().strip() if stated.exists() else "unknown"),
        march=target.march,
        system=f"{platform.system()} {platform.machine()}",
        compiler=str(target.toolchain) if target.toolchain else _compiler(target).split("\n")[0],
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        size=size,
        error=error,
    )
    record = made.to_dict() | {"path": path.name}
    (folder / _RECORD).write_text(json.dumps(record, indent=2), "utf-8")
    _sync(folder / _RECORD)
    return made


def _settings(target: Target) -> Iterator[str]:
    yield from ("-DCMAKE_BUILD_TYPE=Release", f"-DTOMEXPORT_RUNTIME={target.runtime}")
    yield f"-DTOMEXPORT_MARCH={target.march}"
    if target.toolchain:
        yield f"-DCMAKE_TOOLCHAIN_FILE={target.toolchain.absolute()}"
        return
    if not os.environ.get("CXX"):
        yield f"-DCMAKE_CXX_COMPILER={tools()['c++']}"
    package = importlib.util.find_spec("openvino") if target.runtime == "openvino" else None
    for folder in package.submodule_search_locations or () if package else ():
        if (config := Path(folder, "cmake")).is_dir():  # else it is where CMake finds it
            yield f"-DOpenVINO_DIR={config}"


def _first_error(commands: Sequence[Sequence[str]], log: Path) -> str | None:
    """Run commands until one fails; return the first error that it shows, or None."""
    environment = os.environ | {"LC_ALL": "C"}
    with log.open("wb") as output:
        for command in commands:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
            if done.returncode:
                break
        else:
            return None
    text = log.read_text("utf-8", errors="replace")
    shown = found[0] if (found := _ERROR.search(text)) else text.strip().rpartition("\n")[2]
    return " ".join(shown.split()) or f"{command[0]} ended with {done.returncode}"


def _deliver(made: Library, out: Path) -> Library:
    """Put a library into a folder of the user's, under a name that says what it is for."""
    path = out / f"{made.path.stem}-{made.version}-{made.march}{made.path.suffix}"
    with scratch.folder(path) as folder:
        shutil.copyfile(made.path, folder / path.name)
        _sync(folder / path.name)
        (folder / path.name).replace(path)
    return dataclasses.replace(made, path=path)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Be the only process that changes the cache, and remove what a killed one left in it.

    Raises: BuildError for whatever the system refuses.
    """
    folder = cache()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
                for left in folder.glob(f".{_SCRATCH}.*"):
                    shutil.rmtree(left, ignore_errors=True)
            yield
    except OSError as err:
        where = f" ({err.filename})" if err.filename else ""
        raise BuildError(
            f"The kernels could not be written in {folder}: {err.strerror or err}{where}. Set "
            "TOMEXPORT_CACHE to a folder that you can write to."
        ) from err


def _read(entry: Path) -> Library | None:
    """Read an entry of the cache; None if it is not there or not whole."""
    try:
        record = json.loads((entry / _RECORD).read_text("utf-8"))
        found = Library(**record | {"path": entry / record["path"]})
        whole = found.error is not None or found.path.stat().st_size == found.size
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if whole else None


def _succeeded(made: Library) -> Library:
    """Pass on a library that was built.

    Raises: BuildError for one that was not.
    """
    if made.error:
        raise BuildError(
            f"Fused kernels for {made.runtime} {made.version} could not be built: {made.error}. "
            f"The log is {made.path.parent / _LOG}; `tomexport kernels build` tries again."
        )
    return made


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


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
