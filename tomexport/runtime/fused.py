"""Fused kernels in a session: which files want them, and what happens where there are none."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tomexport.artifact import DOMAIN
from tomexport.errors import BackendError, BuildError
from tomexport.kernels import build
from tomexport.runtime.backend import Backend, Request, Session

AUTO, OFF = "auto", "off"
# a node's domain as each format writes it: ONNX with its field number and length before it
_MARKS = {
    ".onnx": b"\x3a%c%b" % (len(DOMAIN), DOMAIN.encode()),
    ".xml": f'version="{DOMAIN}"'.encode(),
}

S = TypeVar("S", bound=Session)


def choice(kernels: str | Path, device: str) -> str | Path:
    """Return what `kernels` of `load` means here: "auto", "off" or the path of a library.

    Raises: BackendError if there is no such library, or if the device cannot run it.
    """
    if kernels == AUTO:
        kernels = os.environ.get("TOMEXPORT_KERNELS") or AUTO
        if kernels not in (AUTO, OFF):
            raise BackendError(f"TOMEXPORT_KERNELS is {kernels!r}; it can be auto or off.")
    if kernels in (AUTO, OFF):
        return kernels
    if device != "CPU":
        raise BackendError(
            f"Fused kernels run on the CPU, not on {device}, which merges in standard operators; "
            "leave the library out."
        )
    path = Path(kernels).absolute()
    if not path.is_file():
        raise BackendError(
            f"There is no library {kernels}. Kernels are auto, off, or the path of a library: "
            "tomexport kernels build --out DIR"
        )
    return path


def compiled(
    backend: Backend, path: Path, request: Request, compile_with: Callable[[Path | None], S]
) -> S:
    """Compile a file with fused kernels if it can use them, otherwise without.

    Args:
        backend: the runtime.
        path: the file.
        request: how to run it.
        compile_with: compiles with a library, or with standard operators only.

    Raises: BackendError if the user's own library does not work, or if the file needs one.
    """
    bound = path.suffix == ".xml"  # IR carries no functions: without kernels it cannot be read
    wanted = request.kernels != OFF and request.device == "CPU"
    if not has_own_nodes(path) or not (wanted or bound):
        return compile_with(None)
    try:
        return compile_with(library(backend, request))
    except (BuildError, BackendError) as err:
        if bound:
            raise BackendError(
                f"{path.name} has nodes of our own, and OpenVINO reads them only with fused "
                f"kernels. {err} Or export it with --ops portable."
            ) from err
        session = compile_with(None)  # if that fails too, it is not for the library
        if request.kernels != AUTO:
            name = Path(request.kernels).name
            raise BackendError(f"The library {name} does not work here. {err}") from err
        build.tell(f"{err} Merging runs in standard operators, which takes longer.")
        return session


def library(backend: Backend, request: Request) -> Path:
    """Return the library that a session is to load.

    Raises: BuildError if it cannot be built, BackendError if the request allows none.
    """
    if request.device != "CPU":
        raise BackendError(f"Fused kernels run on the CPU, not on {request.device}.")
    if request.kernels == OFF:
        raise BackendError("Fused kernels are off.")
    if request.kernels == AUTO:
        return build.library(backend.name, backend.version())
    return Path(request.kernels)


def cannot_load(backend: Backend, library: Path, err: Exception) -> str:
    """Return the message for a library that a runtime refuses, with the system's own reason."""
    last_line = str(err).strip().rpartition("\n")[2]
    why = re.split(rf'{re.escape(str(library))}"?: ', last_line)[-1]
    return (
        f"{backend.name} {backend.version()} cannot load the kernels {library}: {why}. "
        "`tomexport kernels build` builds them anew."
    )


def has_own_nodes(path: Path) -> bool:
    """Tell whether a file has nodes of our domain, without reading all of it into memory."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(_MARKS[path.suffix]) >= 0
    except (OSError, ValueError):  # it cannot be read, or is empty: the runtime says so
        return False
