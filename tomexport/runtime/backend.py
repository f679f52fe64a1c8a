"""What a runtime must offer: one class with one method that compiles a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from tomexport.artifact import GOLDEN_KEY, METADATA_KEY, Golden, Metadata
from tomexport.errors import ArtifactError, BackendError

Array = NDArray[Any]


@dataclass(frozen=True)
class OperatorTime:
    """What operators of one type cost in one call, as the runtime's own profiler has it.

    Attributes:
        type: what the runtime calls it.
        merging: whether these are nodes of ours, or their bodies', or reorders at their borders.
        count: how often they run in a call.
        microseconds: all of them together.
    """

    type: str
    merging: bool
    count: int
    microseconds: float

    @classmethod
    def sum_up(cls, nodes: Iterable[tuple[str, bool, float]], calls: int) -> list[OperatorTime]:
        """Add up (type, merging, microseconds) of every node in every call, the longest first."""
        sums: dict[tuple[str, bool], tuple[int, float]] = {}
        for kind, merging, time in nodes:
            count, total = sums.get((kind, merging), (0, 0.0))
            sums[kind, merging] = count + 1, total + time
        found = [
            cls(kind, merging, round(count / calls), round(total / calls, 2))
            for (kind, merging), (count, total) in sums.items()
        ]
        return sorted(found, key=lambda each: -each.microseconds)


class Session(Protocol):
    """A compiled file."""

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """(batch, channels, height, width); batch None if it is dynamic."""
        ...

    @property
    def precision(self) -> str:
        """The precision that the runtime says it computes in: "f32", "bf16" or "f16"."""
        ...

    @property
    def kernels(self) -> bool:
        """Whether fused kernels run the nodes of our own."""
        ...

    def run(self, images: Array) -> list[Array]:
        """Compute the first output, then those that were asked for by name."""
        ...

    def operators(self) -> list[OperatorTime]:
        """Return what the calls so far cost, if the request was to profile; call it once."""
        ...


@dataclass(frozen=True)
class Request:
    """How to run a file.

    Attributes:
        device: a device of the runtime.
        threads: number of CPU threads; None leaves it to the runtime.
        precision: "f32", "bf16" or "f16"; None is the runtime's own default.
        extra_outputs: names of values inside the graph to return as well.
        kernels: "auto", "off", or the path of a library of fused kernels.
        profile_into: a folder for the runtime's profile of each operator; None for no profile.
    """

    device: str = "CPU"
    threads: int | None = None
    precision: str | None = None
    extra_outputs: tuple[str, ...] = ()
    kernels: str | Path = "auto"
    profile_into: str | None = None


class Backend(Protocol):
    """A runtime. The table of them is `load.BACKENDS`."""

    @property
    def name(self) -> str:
        """What the runtime is called."""
        ...

    @property
    def module(self) -> str:
        """The Python module that it needs."""
        ...

    @property
    def extra(self) -> str:
        """The extra of tomexport that installs it."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of the files that it reads."""
        ...

    def version(self) -> str:
        """Return the release that is installed."""
        ...

    def devices(self) -> dict[str, tuple[str, ...]]:
        """Return the devices that are there, and the precisions of each."""
        ...

    def read_text(self, path: Path) -> dict[str, str]:
        """Return what tomexport wrote into the file, by key."""
        ...

    def compile(self, path: Path, request: Request) -> Session:
        """Compile a file."""
        ...

    def try_library(self, library: Path) -> None:
        """Load a library of fused kernels, to see whether it loads."""
        ...


def check_device(backend: Backend, request: Request) -> None:
    """Refuse what the machine does not have.

    Raises: BackendError listing what there is.
    """
    devices, device, precision = backend.devices(), request.device, request.precision
    if device not in devices:
        raise BackendError(
            f"{backend.name} has no device {device!r} here; it has {', '.join(devices)}."
        )
    if precision is not None and precision not in devices[device]:
        raise BackendError(
            f"{backend.name} on {device} cannot compute in {precision!r} here; it can in "
            f"{', '.join(devices[device])}, or leave the precision out for its own default."
        )


def read_artifact(backend: Backend, path: Path) -> tuple[Metadata, Golden]:
    """Read the metadata and the golden set of a file.

    Raises: ArtifactError if tomexport did not write the file or it is damaged.
    """
    text = backend.read_text(path)
    if METADATA_KEY not in text:
        raise ArtifactError(
            f"{path} carries no tomexport metadata, so there is nothing to verify it against. "
            "Export it with tomexport."
        )
    metadata = Metadata.from_json(text[METADATA_KEY])
    if GOLDEN_KEY not in text:
        raise ArtifactError(f"{path} carries no golden set; export it again.")
    return metadata, Golden.from_text(text[GOLDEN_KEY], metadata.input_shape)
