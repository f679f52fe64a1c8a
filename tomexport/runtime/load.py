"""`load`: an exported file as a function of images."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tomexport.errors import BackendError, MissingExtraError, pick
from tomexport.runtime import fused
from tomexport.runtime.backend import Array, Backend, Request, Session
from tomexport.runtime.onnxruntime_backend import OnnxRuntime
from tomexport.runtime.openvino_backend import OpenVino

BACKENDS: tuple[Backend, ...] = (OnnxRuntime(), OpenVino())


@dataclass(frozen=True)
class Runner:
    """A compiled file. Call it with images to get its first output.

    Attributes:
        backend: name of the runtime.
        device: where it runs.
        precision: what it computes in: "f32", "bf16" or "f16".
        kernels: whether fused kernels do the merging.
        session: the compiled file.
    """

    backend: str
    device: str
    precision: str
    kernels: bool
    session: Session

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """(batch, channels, height, width); batch None if any number of images will do."""
        return self.session.input_shape

    def __call__(self, images: Array) -> Array:
        """Compute the output of a batch.

        Args:
            images: (B, channels, height, width) float32, prepared as the model expects.

        Returns:
            (B, classes) float32; features (B, channels) if the model has no head; one of each patch
            (B, patches, channels) if the file puts out tokens.

        Raises: BackendError if shape or type are not those of the file.
        """
        return self.outputs(images)[0]

    def outputs(self, images: Array) -> list[Array]:
        """Compute all outputs; the first is the result."""
        expected = self.input_shape
        fits = len(images.shape) == len(expected) and all(
            want in (None, got) for want, got in zip(expected, images.shape, strict=True)
        )
        if not fits:
            wanted = "×".join("batch" if d is None else str(d) for d in expected)
            got = "×".join(map(str, images.shape))
            why = "The batch is fixed at export: use --batch N or --batch dynamic there."
            if images.shape[1:] != tuple(expected[1:]):
                why = "Resize them; they are batch × channels × height × width."
            raise BackendError(f"The images are {got}, the file takes {wanted}. {why}")
        if images.dtype != np.float32:
            raise BackendError(
                f"The images are {images.dtype}, the file takes float32: images.astype('float32')"
            )
        return self.session.run(np.ascontiguousarray(images))


def load(
    path: str | Path,
    backend: str | None = None,
    device: str = "CPU",
    threads: int | None = None,
    precision: str | None = None,
    *,
    kernels: str | Path = fused.AUTO,
    extra_outputs: tuple[str, ...] = (),
) -> Runner:
    """Load an exported file.

    Usage:
        model = tomexport.load("model.onnx", backend="openvino", precision="f32")
        logits = model(images)  # (B, 3, H, W) float32 → (B, classes) float32

    Args:
        path: an .onnx or .xml file.
        backend: "onnxruntime" or "openvino"; None takes the first that reads the suffix.
        device: a device of that runtime, "CPU" for instance.
        threads: number of CPU threads; None leaves it to the runtime.
        precision: "f32", "bf16" or "f16"; None is the runtime's own default.
        kernels: "auto" takes fused kernels where they are or can be built, "off" standard
            operators, a path that library. Only the CPU has fused kernels.
        extra_outputs: names of values inside the graph to return as well.

    Raises: BackendError if the file, device, precision or library is not there, UnknownNameError
        for an unknown backend, MissingExtraError if the runtime is not installed.
    """
    path = Path(path)
    chosen = pick("backend", BACKENDS, backend) if backend else readers(path)[0]
    require_readable(path, chosen)
    if threads is not None and threads < 1:
        raise BackendError(f"{threads} threads; a run needs at least 1.")
    library = fused.choice(kernels, device)
    session = chosen.compile(path, Request(device, threads, precision, extra_outputs, library))
    return Runner(chosen.name, device, session.precision, session.kernels, session)


def readers(path: Path) -> tuple[Backend, ...]:
    """Return the runtimes that read a file of this suffix, installed or not.

    Raises: BackendError if none does.
    """
    found = tuple(backend for backend in BACKENDS if path.suffix in backend.suffixes)
    if not found:
        known = sorted({suffix for backend in BACKENDS for suffix in backend.suffixes})
        raise BackendError(
            f"{path.name}: no runtime reads the suffix {path.suffix!r}; known: {', '.join(known)}."
        )
    return found


def choose(path: Path, backend: str | None) -> list[Backend]:
    """Return the runtime of this name; without one, all that are installed and read the file.

    Raises: BackendError if there is no such file, MissingExtraError if no runtime is installed.
    """
    if backend:
        chosen = [pick("backend", BACKENDS, backend)]
        require_readable(path, chosen[0])
        return chosen
    able = readers(path)
    require_readable(path, able[0])
    installed = [b for b in able if importlib.util.find_spec(b.module)]
    if not installed:
        extras = " or ".join(f"pip install 'tomexport[{b.extra}]'" for b in able)
        raise MissingExtraError(
            f"Running {path.name} needs a runtime, and none is installed: {extras}"
        )
    return installed


def default_precisions(backend: Backend, device: str) -> list[str | None]:
    """Return float32, where the device has it, and None for its own where that may be another."""
    known = backend.devices().get(device, ())
    if known == ("f32",):
        return ["f32"]
    return ["f32", None] if "f32" in known else [None]


def require_readable(path: Path, backend: Backend) -> None:
    """Refuse a file that is not there, or not of a kind that the runtime reads.

    Raises: BackendError saying which.
    """
    if not path.is_file():
        raise BackendError(f"There is no file {path}. Check the path.")
    if path.suffix not in backend.suffixes:
        raise BackendError(
            f"{backend.name} does not read {path.suffix!r} files; it reads "
            f"{', '.join(backend.suffixes)}."
        )
    weights = path.with_suffix(".bin")
    if path.suffix == ".xml" and not weights.is_file():
        raise BackendError(f"{path} needs its weights beside it, and there is no {weights.name}.")
