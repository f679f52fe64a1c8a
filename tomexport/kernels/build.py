"""The fused kernels as a library, built by CMake on the machine that runs them, once.

Sessions ask `library` for it. What the result depends on gives its place in the cache, so that
whatever changes, the next session builds anew.
"""

from __future__ import annotations

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

from tomexport import scratch
from tomexport.errors import BuildError
from tomexport.kernels import cache
from tomexport.kernels.cache import Library

KERNELS = Path(__file__).parent
_UNKNOWN = "unknown"
_VARIABLES = ("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_TOOLCHAIN_FILE")  # that CMake heeds
_ERROR = re.compile(r"(?m)^.*\berror: .*$|^CMake Error[\s\S]*?\.$")  # a compiler's, or CMake's


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


@functools.cache
def tell(message: str) -> None:
    """Say something on stderr, once; the logger "tomexport" can send it elsewhere."""
    logging.getLogger("tomexport").warning("tomexport: %s", message)


def library(runtime: str, version: str) -> Path:
    """Return the library for a runtime of this machine; build it if it is not there yet.

    Raises: BuildError if it cannot be built, or could not before, or must not be trusted.
    """
    if not (found := find(runtime, version)):
        tell(f"building fused kernels for {runtime} {version}, once (about 10 s) …")
        with cache.workshop() as folder:  # whoever waited here finds what the other has built
            target = Target(runtime, version)
            found = find(runtime, version) or _build(target, _place(target), folder)
    return found.require().path


def find(runtime: str, version: str) -> Library | None:
    """Return what the cache has for a runtime of this machine, a failure too.

    Raises: BuildError if it has nothing and could not build it, or must not be trusted.
    """
    return cache.get(_place(Target(runtime, version)))


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
    place = _place(target)  # what is missing is said before anything starts
    tell(f"building fused kernels for {target.runtime} {target.version or target.march} …")
    with cache.workshop() as folder:
        return _build(target, place, folder, out).require()


def tools() -> dict[str, str | None]:
    """Return the paths of the compiler and of CMake; None for what is not here."""
    named = os.environ.get("CXX", "").split()[:1]
    beside = str(Path(sys.executable).parent)  # where pip puts its own cmake
    return {
        "c++": next(filter(None, map(shutil.which, named or ("c++", "g++", "clang++"))), None),
        "cmake": shutil.which("cmake") or shutil.which("cmake", path=beside),
    }


def _place(target: Target) -> Path:
    """Return where in the cache a target belongs."""
    text = json.dumps(_ingredients(target), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    version = target.version or _UNKNOWN
    return cache.folder() / f"{target.runtime}-{version}-{target.march}-{digest}"


def _ingredients(target: Target) -> dict[str, object]:
    """Return all that a library depends on.

    Raises: BuildError if the compiler or CMake is missing.
    """
    files = (p for p in KERNELS.rglob("*") if p.suffix in (".h", ".cpp", ".txt"))
    return {
        "sources": {str(p.relative_to(KERNELS)): p.read_text("utf-8") for p in files},
        "compiler": _compiler(target),
        "variables": [os.environ.get(name) for name in _VARIABLES],
        "architecture": [target.march, _processor() if target.march == "native" else None],
        "runtime": [target.runtime, target.version],
        "machine": [platform.system(), platform.machine()],
    }


def _compiler(target: Target) -> str:
    """Return what tells one compiler from another: its version and its place."""
    found = tools() | ({"c++": "the toolchain's"} if target.toolchain else {})
    if missing := [name for name, path in found.items() if path is None]:
        raise BuildError(
            f"Fused kernels cannot be built here, for want of {' and '.join(missing)}: apt "
            "install g++ cmake, or pip install cmake."
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


def _build(target: Target, place: Path, folder: Path, out: Path | None = None) -> Library:
    """Build in a scratch folder; the library, or the record of its failure, appears whole."""
    made = _make(target, folder / "new", folder / "build")
    return _deliver(made, out) if out and not made.error else cache.put(made, place)


def _make(target: Target, folder: Path, workspace: Path) -> Library:
    """Compile into a new folder, with the log."""
    folder.mkdir(mode=0o700)
    cmake = str(tools()["cmake"])
    configure = [cmake, "-S", str(KERNELS / "native"), "-B", str(workspace), *_settings(target)]
    error = _first_error((configure, [cmake, "--build", str(workspace)]), folder / cache.LOG)
    path, size = folder / f"libtomexport_{target.runtime}", 0
    built = next(workspace.glob(f"{path.name}.*"), None)
    if not error and not built:
        error = f"CMake finished without a {path.name}"
    if built and not error:
        path = folder / built.name
        built.rename(path)
        path.chmod(0o700)
        size = path.stat().st_size
    elif error and target.toolchain and target.runtime == "openvino":
        error += (
            " (the toolchain file must set CMAKE_PREFIX_PATH or OpenVINO_DIR to the OpenVINO of "
            "the other machine)"
        )
    stated = workspace / "version"  # the release that CMake found, or those that will do
    return Library(
        path=path,
        runtime=target.runtime,
        version=target.version or (stated.read_text().strip() if stated.exists() else _UNKNOWN),
        march=target.march,
        system=f"{platform.system()} {platform.machine()}",
        compiler=str(target.toolchain) if target.toolchain else _compiler(target).split("\n")[0],
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        size=size,
        error=error,
    )


def _settings(target: Target) -> Iterator[str]:
    """Say what CMake is told beside its folders."""
    yield from ("-DCMAKE_BUILD_TYPE=Release", f"-DTOMEXPORT_RUNTIME={target.runtime}")
    yield f"-DTOMEXPORT_MARCH={target.march}"
    yield "-DCMAKE_SKIP_RPATH=ON"  # no path of this machine: OpenVINO is loaded already
    if target.toolchain:
        yield f"-DCMAKE_TOOLCHAIN_FILE={target.toolchain.absolute()}"
        return
    if not os.environ.get("CXX"):
        yield f"-DCMAKE_CXX_COMPILER={tools()['c++']}"
    package = importlib.util.find_spec("openvino") if target.runtime == "openvino" else None
    for place in (package and package.submodule_search_locations) or ():
        if (config := Path(place, "cmake")).is_dir():  # else it is where CMake finds it
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
    return " ".join(shown.split()).rstrip(".")[:400] or f"{command[0]} ended with {done.returncode}"


def _deliver(made: Library, out: Path) -> Library:
    """Put a library into a folder of the user's, under a name that says what it is for."""
    path = out / f"{made.path.stem}-{made.version}-{made.march}{made.path.suffix}"
    with scratch.folder(path) as folder:
        shutil.copyfile(made.path, folder / path.name)
        cache.sync(folder / path.name)
        (folder / path.name).replace(path)
    return dataclasses.replace(made, path=path)
