"""How files appear: whole or not at all, and never over what should stay."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomexport import scratch
from tomexport.artifact import DOMAIN, GOLDEN_KEY, METADATA_KEY, Golden, Metadata
from tomexport.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

_TWO_GB = 2**31 - 2**24  # protobuf's limit, less room for the graph itself


def check_output(model: Any, output: Path, force: bool) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises: ExportError saying why.
    """
    if output.suffix not in (".onnx", ".xml"):
        raise ExportError(
            f"{output.name}: the suffix {output.suffix!r} says no format; use .onnx, or .xml for "
            "OpenVINO IR."
        )
    if output.is_dir():
        raise ExportError(f"{output} is a folder; name a file in it.")
    if not output.parent.is_dir():
        raise ExportError(f"There is no folder {output.parent} for {output.name}; make it first.")
    targets = [output, output.with_suffix(".bin")] if output.suffix == ".xml" else [output]
    existing = [target for target in targets if target.exists()]
    if isinstance(model, (str, Path)) and any(
        t.samefile(model) for t in existing if Path(model).exists()
    ):
        raise ExportError(
            f"Writing {output.name} would replace the checkpoint {model} itself; choose another "
            "name for the output."
        )
    if existing and not force:
        names = " and ".join(map(str, existing))
        raise ExportError(f"{names} exists already; --force replaces it.")


@contextlib.contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Give a scratch folder for an output's files.

    Raises: ExportError if it cannot be made, or if writing in it fails.
    """
    try:
        with scratch.folder(output) as path:
            yield path
    except OSError as err:
        raise ExportError(
            f"{output.name} could not be written in {output.parent}: {err.strerror or err}. "
            "Nothing was kept."
        ) from err


def check_file(path: Path, suffix: str, what: str, force: bool) -> None:
    """Refuse a result's file that cannot be written, before any work is done.

    Args:
        path: the file.
        suffix: what its name must end with: ".png".
        what: what it is, in words: "a chart".
        force: replace an existing file.

    Raises: ExportError saying why.
    """
    if path.suffix != suffix:
        raise ExportError(f"{path.name}: {what} is a {suffix}, not {path.suffix!r}.")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise ExportError(f"There is no folder {path.parent} for {path.name}; make it first.")
    if path.exists() and not force:
        raise ExportError(f"{path} exists already; --force replaces it.")


def write_file(path: Path, content: bytes, force: bool) -> int:
    """Write one file, whole or not at all; return its size in bytes.

    Raises: ExportError if it cannot be written.
    """
    with staging(path) as folder:
        (folder / path.name).write_bytes(content)
        return publish(folder, path, force)[str(path)]


def write(graph: ir.Model, metadata: Metadata, golden: Golden, staged: Path) -> None:
    """Write the file, whole, with its metadata and golden set inside."""
    text = {METADATA_KEY: metadata.to_json(), GOLDEN_KEY: golden.to_text()}
    if staged.suffix == ".onnx":
        graph.metadata_props.update({f"{DOMAIN}.{key}": value for key, value in text.items()})
        _save_onnx(graph, staged)
        return
    from tomexport.runtime.openvino_backend import OpenVino

    between = staged.with_suffix(".onnx")
    _save_onnx(graph, between)
    OpenVino().save_ir(between, staged, half=metadata.half, text=text)
    for part in staged.parent.glob(f"{between.name}*"):
        part.unlink()


def _save_onnx(graph: ir.Model, path: Path) -> None:
    """Write one file; from 2 GB on, where protobuf ends, the weights go to a second one."""
    import onnx_ir as ir

    weights = [v.const_value for v in graph.graph.initializers.values()]
    large = sum(tensor.nbytes for tensor in weights if tensor is not None) > _TWO_GB
    ir.save(graph, path, external_data=f"{path.name}.data" if large else None)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def publish(folder: Path, output: Path, force: bool) -> dict[str, int]:
    """Move the finished files into place, what they depend on first; return their sizes."""
    staged = sorted(folder.iterdir(), key=lambda file: file.name == output.name)
    targets = [output.parent / file.name for file in staged]
    if not force and (existing := [str(t) for t in targets if t.exists()]):
        raise ExportError(f"{' and '.join(existing)} appeared meanwhile; --force replaces it.")
    with _undisturbed():  # all of them or none
        for file, target in zip(staged, targets, strict=True):
            file.replace(target)
    return {str(target): target.stat().st_size for target in targets}


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back an interrupt until the block is done."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
