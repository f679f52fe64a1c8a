"""Everything tomexport refuses, and the lookup that suggests what was meant.

    TomexportError            exit code 2 on the command line
    ├── UnknownNameError      a name that no table holds
    ├── PlanError             a schedule or a token plan that cannot be
    ├── CheckpointError       a file that is not the weights it should be
    ├── RewriteError          a model or method that cannot be reduced correctly
    ├── ExportError           a graph or a file that cannot be written
    ├── ArtifactError         a file that tomexport did not write, or that is damaged
    ├── ImageError            images or labels that cannot be read or do not fit
    ├── LearnError            merging that cannot be learned as asked
    ├── BuildError            fused kernels that cannot be built
    ├── BackendError          a runtime, device or precision that is not there
    ├── MissingExtraError     an optional dependency that is not installed
    └── VerifyError           a check that failed: exit code 1

Every message says what, with numbers, why, and how to mend it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Protocol, TypeVar


class TomexportError(Exception):
    """Base of all errors that tomexport raises on purpose."""


class UnknownNameError(TomexportError):
    """A name that the table it was looked up in does not hold."""


class PlanError(TomexportError):
    """A schedule that cannot be read, or a plan that cannot be made from it."""


class CheckpointError(TomexportError):
    """A checkpoint that cannot be read or does not fit the architecture."""


class RewriteError(TomexportError):
    """A model whose tokens cannot be reduced correctly."""


class ExportError(TomexportError):
    """A graph or a file that cannot be written."""


class ArtifactError(TomexportError):
    """A file without readable metadata or golden set of tomexport's."""


class ImageError(TomexportError):
    """Images, or labels of them, that cannot be read or do not fit."""


class LearnError(TomexportError):
    """Merging that cannot be learned as it was asked for."""


class BuildError(TomexportError):
    """Fused kernels that cannot be built, or that must not be loaded."""


class BackendError(TomexportError):
    """A runtime, device, precision or input that does not work."""


class MissingExtraError(TomexportError):
    """An optional dependency that is not installed."""


class VerifyError(TomexportError):
    """An exported file that does not compute what PyTorch computes."""


class Named(Protocol):
    """Anything with a name, which is all that a table entry needs."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def pick(kind: str, table: Iterable[T], name: str) -> T:
    """Return the entry of `table` called `name`.

    Raises: UnknownNameError naming the known entries and the nearest one.
    """
    by_name = {entry.name: entry for entry in table}
    require_known(kind, name, by_name)
    return by_name[name]


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Check that a name is one of those known.

    Raises: UnknownNameError naming the known ones and the nearest one.
    """
    names = sorted(known)
    if name not in names:
        near, others = did_you_mean(name, names), ", ".join(names) or "none"
        raise UnknownNameError(f"Unknown {kind} {name!r}; known: {others}.{near}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises: MissingExtraError with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name is None or err.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"This needs {module}, which is not installed. "
            f"Install it with: pip install 'tomexport[{extra}]'"
        ) from err


def plain(error: BaseException) -> str:
    """Return the first sentence of a foreign error, for use inside a message of ours."""
    lines = str(error).strip().splitlines()
    sentence = lines[0].strip().split(". ")[0].rstrip(".") if lines else ""
    if len(sentence) > 200:
        sentence = f"{sentence[:200]}…"
    return sentence if len(sentence) > 8 else f"{type(error).__name__} {sentence}".strip()
