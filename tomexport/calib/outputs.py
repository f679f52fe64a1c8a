"""What a model computes of many images, kept as it comes: a run goes on where it was stopped.

Outputs are kept in the user's cache, a file for each few images, named after all that they depend
on. A file that is damaged, or was not written whole, is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tomexport import __version__, scratch
from tomexport.artifact import Array, Metadata
from tomexport.calib.images import PREPARED, ImageSet, Skipped, preprocessing, require_some
from tomexport.errors import BackendError, need, pick
from tomexport.kernels import cache
from tomexport.runtime.load import BACKENDS, load
from tomexport.runtime.verify import run_all

Progress = Callable[[str], None]

CHUNK = 64  # images that are lost at most when a run is stopped
BATCH = 8  # where the file leaves it open
_MOST_BYTES = 2**31  # beyond that, what was used longest ago goes


@dataclass(frozen=True)
class Engine:
    """What computes outputs.

    Attributes:
        name: in words.
        identity: all that the outputs depend on, apart from the images.
        run: (B, channels, height, width) float32 → (B, classes) float32.
    """

    name: str
    identity: Mapping[str, object]
    run: Callable[[Array], Array]


@dataclass(frozen=True)
class Outputs:
    """What an engine computed.

    Attributes:
        values: (M, classes) float32, or features or tokens, of the images that could be read.
        indices: (M,) which images of the set these are.
        skipped: the images that could not be read.
        n_kept: images whose outputs an earlier run had computed.
    """

    values: Array
    indices: Array
    skipped: tuple[Skipped, ...]
    n_kept: int


def file_engine(
    path: Path,
    backend: str,
    device: str = "CPU",
    precision: str | None = None,
    kernels: str | Path = "auto",
    batch: int | None = None,
) -> Engine:
    """Load a file as an engine; what it computes in is in its identity.

    Args:
        path: an .onnx or .xml file that tomexport wrote.
        backend: name of the runtime.
        device: where to run.
        precision: "f32", "bf16" or "f16"; None is the runtime's own default.
        kernels: "auto", "off", or the path of a library of fused kernels.
        batch: images per call; None takes the file's, or 8.

    Raises: what `load` raises.
    """
    runner = load(path, backend, device, None, precision, kernels=kernels)
    size = runner.input_shape[0] or batch or BATCH
    identity = {
        "file": sha256(path),
        "runtime": backend,
        "version": pick("backend", BACKENDS, backend).version(),
        "device": device,
        "precision": runner.precision,
        "kernels": runner.kernels,
        "library": str(kernels),
        "tomexport": __version__,
    }
    name = f"{backend} {runner.precision} {'fused' if runner.kernels else 'standard'}"
    return Engine(name, identity, lambda images: run_all(runner, images, size)[0])


def parts(path: Path) -> list[Path]:
    """Return a file and, if its weights lie apart, the one that has them."""
    apart = path.with_suffix(".bin") if path.suffix == ".xml" else Path(f"{path}.data")
    return [path, apart] if apart.is_file() else [path]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file and of the weights beside it."""
    total = hashlib.sha256()
    for part in parts(path):
        with part.open("rb") as file:
            for block in iter(partial(file.read, 2**20), b""):
                total.update(block)
    return total.hexdigest()


def compute(
    engine: Engine,
    images: ImageSet,
    metadata: Metadata,
    progress: Progress = lambda message: None,
) -> Outputs:
    """Compute an engine's outputs, or take those that an earlier run has computed.

    Args:
        engine: what computes.
        images: of what.
        metadata: of the file, which says how to prepare the images.
        progress: is told how far it is.

    Raises: ImageError if no image can be read, BackendError if the cache cannot be written,
        BuildError if it must not be trusted.
    """
    folder = cache.folder() / "outputs"
    chunks, n_kept = [], 0
    for start in range(0, len(images), CHUNK):
        part = range(start, min(start + CHUNK, len(images)))
        progress(f"{engine.name}: image {start + 1} of {len(images)}")
        file = folder / f"{_key(engine, images, part, metadata)}.npz"
        chunk = _read(file, len(part))
        if chunk:
            n_kept += len(chunk.indices)
        else:
            chunk = _computed(engine, images.take(part), metadata)
            _write(file, chunk)
        scratch.farewell(f"outputs of {start + len(part)} images are kept for the next run")
        chunks.append(Outputs(chunk.values, chunk.indices + start, chunk.skipped, 0))
    _prune(folder)
    skipped = tuple(each for chunk in chunks for each in chunk.skipped)
    require_some(images, skipped)
    return Outputs(
        np.concatenate([c.values for c in chunks if len(c.values)]),
        np.concatenate([c.indices for c in chunks]),
        skipped,
        n_kept,
    )


def _computed(engine: Engine, images: ImageSet, metadata: Metadata) -> Outputs:
    (batch,) = images.batches(metadata, CHUNK)
    values = engine.run(batch.pixels) if len(batch.pixels) else np.zeros((0, 0), np.float32)
    return Outputs(values, np.array(batch.indices, np.int64), batch.skipped, 0)


def _key(engine: Engine, images: ImageSet, part: range, metadata: Metadata) -> str:
    everything = {
        "engine": dict(engine.identity),
        "images": images.digest(part),
        "preprocessing": dict(preprocessing(metadata)),
        "prepared": PREPARED,
        "shape": metadata.input_shape[1:],
        "pillow": need("PIL", "calib").__version__,
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _read(file: Path, n: int) -> Outputs | None:
    """Read what `_write` wrote of n images; None for nothing, or for what is not whole."""
    try:
        with file.open("rb") as raw, np.load(raw) as stored:  # a zip, with checksums
            values, indices = stored["values"], stored["indices"]
            skipped = tuple(Skipped(**each) for each in json.loads(str(stored["skipped"])))
        file.touch()
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    fits = values.ndim > 1 and len(values) == len(indices) == n - len(skipped)
    return Outputs(values, indices, skipped, 0) if fits else None


def _write(file: Path, chunk: Outputs) -> None:
    skipped = json.dumps([asdict(each) for each in chunk.skipped])
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with scratch.folder(file) as folder:
            whole = folder / file.name
            np.savez(whole, values=chunk.values, indices=chunk.indices, skipped=skipped)
            whole.replace(file)
    except OSError as err:
        raise BackendError(
            f"Outputs could not be kept in {file.parent}: {err.strerror or err}. Set "
            "TOMEXPORT_CACHE to a folder that you can write to."
        ) from err


def _prune(folder: Path) -> None:
    """Remove what was used longest ago, beyond what may lie there."""
    found = []
    for file in folder.glob("*.npz"):
        with contextlib.suppress(FileNotFoundError):  # another process may have been quicker
            found.append((file.stat(), file))
    total = 0
    for status, file in sorted(found, key=lambda each: -each[0].st_mtime):
        total += status.st_size
        if total > _MOST_BYTES:
            file.unlink(missing_ok=True)
