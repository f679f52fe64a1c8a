"""One point on one machine: exported, timed in turns with the unmerged file, judged on images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tomexport import pipeline
from tomexport.artifact import Array, Metadata
from tomexport.calib.evaluate import label_array, n_classes
from tomexport.calib.fidelity import cosines, divergences, hits
from tomexport.calib.images import ImageSet, Skipped, require_some
from tomexport.calib.search.front import Measured
from tomexport.calib.search.space import Point
from tomexport.errors import ImageError, pick
from tomexport.kernels import cache
from tomexport.runtime.backend import read_artifact
from tomexport.runtime.load import BACKENDS, load
from tomexport.runtime.timing import MIN_ROUNDS, Interval, Job, medians, take_turns, worker
from tomexport.runtime.verify import run_all

if TYPE_CHECKING:
    from tomexport.exporter.source import Source

Progress = Callable[[str], None]
INT8 = "int8"
_LAUNCHES = 2  # two processes of one file can differ for as long as they live


@dataclass(frozen=True)
class Half:
    """Some of the images, and what the unmerged model makes of them.

    Attributes:
        pixels: (N, channels, height, width) float32.
        labels: (N,) class of each, −1 for none.
        outputs: (N, classes), the unmerged model's.
    """

    pixels: Array
    labels: Array
    outputs: Array

    def loss(self, outputs: Array, output: str) -> tuple[float, float]:
        """Return what a model loses here, and its mean divergence from the unmerged one."""
        if output != "logits":
            apart = float(1 - cosines(self.outputs, outputs).mean())
            return apart, apart
        divergence = float(divergences(self.outputs, outputs).mean())
        known = self.labels >= 0
        if not known.any():
            return float((outputs.argmax(1) != self.outputs.argmax(1)).mean()), divergence
        before, after = (
            float(hits(each[known], self.labels[known]).mean()) for each in (self.outputs, outputs)
        )
        return before - after, divergence

    @property
    def top1(self) -> float | None:
        """The unmerged model's accuracy; None without labels."""
        known = self.labels >= 0
        return float(hits(self.outputs[known], self.labels[known]).mean()) if known.any() else None


@dataclass(frozen=True)
class Prepared:
    """Images, read once: one half to search on, one to see whether it holds elsewhere.

    Attributes:
        search, held_out: the halves.
        skipped: those that could not be read.
    """

    search: Half
    held_out: Half
    skipped: tuple[Skipped, ...]


def halves(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Draw one half of images to search on, the other to hold out; always the same ones.

    Raises: ImageError if there is one image only.
    """
    if len(images) < 2:
        raise ImageError("One image cannot be searched on and held out as well; give two or more.")
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    middle = (len(order) + 1) // 2
    return images.take(sorted(order[:middle])), images.take(sorted(order[middle:]))


def prepare(
    both: tuple[ImageSet, ImageSet], metadata: Metadata, run: Callable[[Array], Array]
) -> Prepared:
    """Read images, and compute what the unmerged model makes of them.

    Args:
        both: those to search on, and those to hold out; labels are classes of the model.
        metadata: how to prepare them.
        run: computes the unmerged model.

    Raises: ImageError if none of either can be read.
    """
    read, skipped = [], []
    for half in both:
        batches = list(half.batches(metadata))
        missing = [each for batch in batches for each in batch.skipped]
        require_some(half, missing)
        skipped += missing
        indices = [i for batch in batches for i in batch.indices]
        labels = label_array(half)
        known = np.full(len(indices), -1) if labels is None else labels[indices]
        read.append((np.concatenate([batch.pixels for batch in batches]), known))
    if not all((labels >= 0).any() for _, labels in read):  # both halves are judged alike
        read = [(pixels, np.full_like(labels, -1)) for pixels, labels in read]
    searched, held_out = (Half(pixels, labels, run(pixels)) for pixels, labels in read)
    return Prepared(searched, held_out, tuple(skipped))


class Meter:
    """Measures points of a model against its unmerged file, in one runtime of one machine."""

    def __init__(
        self, found: Source, folder: Path, suffix: str, job: Job, calibration: ImageSet, *,
        seconds: float, progress: Progress,
    ) -> None:  # fmt: skip
        """Export the unmerged file.

        Args:
            found: the model.
            folder: for files that live as long as the search.
            suffix: ".onnx" or ".xml".
            job: how to run files; its path does not matter.
            calibration: images that int8 is calibrated on.
            seconds: time each point for at least so long.
            progress: is told what is being done.
        """
        self.found, self._folder, self._suffix = found, folder, suffix
        self._calibration = calibration
        self._seconds, self._progress = seconds, progress
        progress("exporting the unmerged model")
        path = folder / f"none{suffix}"
        pipeline.export(found, "none", path, verify=False)
        self.metadata, golden = read_artifact(pick("backend", BACKENDS, job.backend), path)
        self.n_classes = n_classes(self.metadata, golden)
        self._none = replace(job, path=str(path), precision="f32")

    def unmerged(self, pixels: Array) -> Array:
        """Compute the unmerged model, in float32."""
        return _computing(self._none)(pixels)

    def unmerged_ms(self) -> float:
        """Return the median time of a call of the unmerged file, in milliseconds."""
        with cache.alone("timing"), worker(self._none) as none:
            (samples,) = take_turns([none], MIN_ROUNDS, self._seconds)
        return round(float(np.median(medians(samples))), 4)

    def measure(self, point: Point, images: Prepared) -> Measured:
        """Export a point, time it and judge it; its file is gone afterwards.

        Raises: what `export`, `load` and the timing raise.
        """
        path = self._folder / f"point{self._suffix}"
        try:
            job = self._file(point, path)
            self._progress(f"timing {point.schedule}")
            ratio = self._time(job)
            self._progress(f"judging {point.schedule}")
            halves = (images.search, images.held_out)
            compute = _computing(job)
            outputs = [compute(half.pixels) for half in halves]
        finally:
            for part in self._folder.glob("point*"):
                part.unlink()
        (loss, divergence), (held_out, held_out_divergence) = (
            half.loss(each, self.metadata.output)
            for half, each in zip(halves, outputs, strict=True)
        )
        return Measured(
            point.method, point.schedule, point.precision, point.removed, point.gmac,
            ratio, loss, divergence, held_out, held_out_divergence,
        )  # fmt: skip

    def deliver(self, point: Point, output: Path, *, force: bool) -> None:
        """Export a point to stay, with its proof."""
        self._export(point, output, verify=True, force=force)

    def _file(self, point: Point, path: Path) -> Job:
        self._progress(f"exporting {point.schedule}")
        self._export(point, path, verify=False, force=True)
        precision = "f32" if point.precision == INT8 else point.precision
        return replace(self._none, path=str(path), precision=precision)

    def _export(self, point: Point, path: Path, *, verify: bool, force: bool) -> None:
        quantized = point.precision == INT8
        # with our own nodes, which fused kernels serve in an int8 file of either runtime
        file = self._folder / "float.onnx" if quantized else path
        pipeline.export(
            self.found, point.schedule, file, method=point.method, verify=verify,
            force=force or quantized,
            progress=self._progress,
        )  # fmt: skip
        if quantized:
            from tomexport.calib.quantize import quantize, write_int8

            images, told = self._calibration, self._progress
            if verify:
                quantize(file, images, path, timed=False, force=force, progress=told)
            else:  # it is judged here, as other points are
                write_int8(file, path, images, told)

    def _time(self, job: Job) -> Interval:
        """Return the time over the unmerged file's, of several launches of both.

        Processes that share this machine time one after the other.
        """
        ratios = []
        for _ in range(_LAUNCHES):
            with cache.alone("timing"), ExitStack() as stack:
                both = [stack.enter_context(worker(each)) for each in (job, self._none)]
                own, none = take_turns(both, MIN_ROUNDS, self._seconds / _LAUNCHES)
            ratios.append(medians(own) / medians(none))
        shared = min(map(len, ratios))
        return Interval.of(np.array([each[:shared] for each in ratios]))


def _computing(job: Job) -> Callable[[Array], Array]:
    """Load a file as a function from images, one at a time, to its outputs."""
    runner = load(job.path, job.backend, job.device, precision=job.precision, kernels=job.kernels)
    return lambda pixels: run_all(runner, pixels, 1)[0]
