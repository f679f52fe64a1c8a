"""The libraries of fused kernels, as the `kernels` commands build and list them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tomexport.errors import MissingExtraError, TomexportError, pick
from tomexport.kernels import build, cache
from tomexport.kernels.cache import Library
from tomexport.runtime.backend import Backend
from tomexport.runtime.load import BACKENDS


def build_libraries(
    runtimes: Sequence[str] = (),
    *,
    march: str = "native",
    toolchain: Path | None = None,
    out: Path | None = None,
) -> tuple[Library, ...]:
    """Build anew, into the cache or into a folder.

    Args:
        runtimes: their names; none takes all that are installed.
        march: architecture, as the compiler's -march takes it.
        toolchain: CMake's toolchain file for another machine, whose runtimes are meant then.
        out: the folder, for another machine; None is the cache of this one.

    Raises: BuildError if one cannot be built, MissingExtraError if a runtime is not installed.
    """
    chosen = [pick("runtime", BACKENDS, name) for name in runtimes] or _installed()
    if not chosen:
        raise MissingExtraError(
            "There is no runtime here to build kernels for: pip install 'tomexport[onnxruntime]'. "
            "For another machine, name it with --runtime."
        )
    targets = [
        build.Target(b.name, None if toolchain else b.version(), march, toolchain) for b in chosen
    ]
    return tuple(build.build(target, out) for target in targets)


def stored_libraries() -> tuple[tuple[Library, bool], ...]:
    """Return all that the cache holds, each with whether sessions here use it.

    Raises: BuildError if the cache must not be trusted.
    """
    used = [_used(backend) for backend in _installed()]
    return tuple((library, library in used) for library in cache.stored())


def _installed() -> list[Backend]:
    return [backend for backend in BACKENDS if importlib.util.find_spec(backend.module)]


def _used(backend: Backend) -> Library | None:
    try:
        return build.find(backend.name, backend.version())
    except (TomexportError, ImportError, RuntimeError, OSError):
        return None  # `doctor` says what is wrong with it
