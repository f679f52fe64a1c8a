"""How good an exported file is on images: right, where they have labels, and like the unmerged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tomexport import __version__, pipeline
from tomexport.artifact import Array, Golden, Metadata
from tomexport.calib.fidelity import Estimate, Likeness, difference, hits, likeness, share
from tomexport.calib.images import ImageSet, Skipped
from tomexport.calib.outputs import Engine, Outputs, Progress, compute, file_engine
from tomexport.errors import ArtifactError, ImageError
from tomexport.runtime.backend import Backend, Request, check_device, read_artifact
from tomexport.runtime.baselines import NONE, beside
from tomexport.runtime.load import choose, default_precisions, require_readable


@dataclass(frozen=True)
class Accuracy:
    """How often the label is the first class, or among the first five.

    Attributes:
        top1: share of the images with labels.
        top5: None if the model has five classes or fewer.
    """

    top1: Estimate
    top5: Estimate | None


@dataclass(frozen=True)
class Evaluated:
    """A file in one runtime and precision.

    Attributes:
        backend, device, precision: what computed.
        kernels: whether fused kernels did the merging.
        images: how many images it computed.
        n_kept: for how many of them an earlier run had.
        accuracy: None without labels.
        change: accuracy above the unmerged model's, paired by image; None without either.
        likeness: to the unmerged model; None without one.
        failures: which limits it misses.
    """

    backend: str
    device: str
    precision: str
    kernels: bool
    images: int
    n_kept: int
    accuracy: Accuracy | None
    change: Accuracy | None
    likeness: Likeness | None
    failures: tuple[str, ...]

    @property
    def name(self) -> str:
        """What computed, in words."""
        return f"{self.backend} {self.precision} {'fused' if self.kernels else 'standard'}"


@dataclass(frozen=True)
class EvaluateReport:
    """The result of `evaluate`.

    Attributes:
        path: the file.
        model, method, schedule: what it is.
        images: which images, in words.
        n_labelled: how many of those that could be read have labels.
        skipped: the images that could not be read.
        reference: what the unmerged model is and what computed it, in words; None without one.
        reference_accuracy: of that; None without labels.
        runs: one per runtime and precision.
        notes: what the user should know.
    """

    path: str
    model: str
    method: str
    schedule: str
    images: str
    n_labelled: int
    skipped: tuple[Skipped, ...]
    reference: str | None
    reference_accuracy: Accuracy | None
    runs: tuple[Evaluated, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every run keeps the limits."""
        return not any(run.failures for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return {"passed": self.passed} | dataclasses.asdict(self)


def evaluate(
    path: str | Path,
    images: ImageSet,
    *,
    backends: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    device: str = "CPU",
    kernels: str | Path = "auto",
    batch: int | None = None,
    baseline: str | Path | None = None,
    against: str | Path | None = None,
    arch: str | None = None,
    min_top1: float | None = None,
    min_agreement: float | None = None,
    progress: Progress = lambda message: None,
) -> EvaluateReport:
    """Measure how right a file is on images, and how like the unmerged model.

    A run that is stopped goes on where it was when it is started again: outputs are kept in the
    cache.

    Args:
        path: an .onnx or .xml file that tomexport wrote.
        images: with labels or without.
        backends: the runtimes; None takes all that are installed and read the file.
        precisions: None takes float32, and the runtime's own default where that differs.
        device: where to run.
        kernels: "auto", "off", or the path of a library of fused kernels.
        batch: images per call; None takes the file's, or 8.
        baseline: the unmerged export; None looks for STEM.none.SUFFIX beside the file.
        against: runs the unmerged model in PyTorch instead: the checkpoint or name.
        arch: timm name of that checkpoint; None takes the file's.
        min_top1: the least top-1 accuracy that every run must have, as a share.
        min_agreement: the least share of images with the unmerged model's first class.
        progress: is told how far it is.

    Raises: ImageError if images or labels do not fit, ArtifactError or VerifyError if there is
        nothing to judge by or the baseline is another model, BackendError if something cannot run.
    """
    path = Path(path)
    chosen = [choose(path, name)[0] for name in dict.fromkeys(backends or ())] or choose(path, None)
    for backend in chosen:
        for precision in precisions or (None,):
            check_device(backend, Request(device, precision=precision))
    metadata, golden = read_artifact(chosen[0], path)
    images = images.classed(n_classes(metadata, golden))
    judge = Judge(metadata.output, label_array(images), min_top1, min_agreement)

    def load(file: Path, backend: Backend, precision: str | None) -> Engine:
        progress(f"{backend.name}: loading {file.name}")
        return file_engine(file, backend.name, device, precision, kernels, batch)

    reference = None
    if against:
        reference = _pytorch(path, metadata, against, arch)
    elif peer := _baseline(path, metadata, chosen[0], baseline):
        reference = load(peer, chosen[0], default_precisions(chosen[0], device)[0])
        int8 = ", int8" if read_artifact(chosen[0], peer)[0].quantization else ""
        reference = dataclasses.replace(reference, name=f"{peer.name}{int8}, {reference.name}")
    judge.require_a_measure(path, reference)
    expected = compute(reference, images, metadata, progress) if reference else None
    runs: list[Evaluated] = []
    for backend in chosen:
        for precision in precisions or default_precisions(backend, device):
            engine = load(path, backend, precision)
            if precision is None and engine.identity["precision"] == "f32":
                continue  # the default is float32, which was computed already
            found = compute(engine, images, metadata, progress)
            runs.append(judge.run(engine, found, expected))
    plan = metadata.plan
    return EvaluateReport(
        str(path), plan.model, plan.method, plan.schedule,
        images=images.described(found.skipped), n_labelled=judge.n_labelled(found),
        skipped=found.skipped, reference=reference.name if reference else None,
        reference_accuracy=judge.accuracy(expected) if expected else None,
        runs=tuple(runs), notes=images.notes,
    )  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """What outputs are measured by: labels, and the outputs of a reference.

    Attributes:
        output: "logits", "features" or "tokens".
        labels: (N,) class of each image, −1 for none; None if no image has one.
        min_top1, min_agreement: as in `evaluate`.
    """

    output: str
    labels: Array | None
    min_top1: float | None
    min_agreement: float | None

    def check_limits(self) -> None:
        """Refuse limits that are no shares, or that these outputs cannot be held to."""
        for name, limit in (("top1", self.min_top1), ("agreement", self.min_agreement)):
            if limit is not None and not 0 <= limit <= 1:
                raise ArtifactError(f"--min-{name} {limit} is no share; use 0.9 for 90 %.")
            if limit is not None and self.output != "logits":
                raise ArtifactError(
                    f"--min-{name} goes with classes, and the file gives {self.output}; leave it "
                    "out."
                )

    def require_a_measure(self, path: Path, reference: Engine | None) -> None:
        """Refuse to begin where nothing could be said in the end."""
        self.check_limits()
        ways = (
            "Give --baseline FILE, the unmerged export (export --with-baselines writes it as "
            f"{beside(path, NONE).name}), or --against MODEL, which runs it in PyTorch."
        )
        if self.labels is None and reference is None:
            raise ArtifactError(
                f"There is nothing to measure {path} by: no image has a label, and there is no "
                f"unmerged model. {ways} Or give --labels FILE."
            )
        if self.min_agreement is not None and reference is None:
            raise ArtifactError(
                f"--min-agreement needs the unmerged model to judge {path} by. {ways}"
            )
        if self.min_top1 is not None and self.labels is None:
            raise ArtifactError(
                "--min-top1 needs labels, and no image has one. Give --labels FILE, a csv of file "
                "names and class indices."
            )

    def n_labelled(self, found: Outputs) -> int:
        """Return how many of the images that could be read have labels."""
        return 0 if self.labels is None else int((self.labels[found.indices] >= 0).sum())

    def accuracy(self, found: Outputs) -> Accuracy | None:
        """Return how often outputs are right; None without labels."""
        top = [share(h) for h in self._hits(found)]
        return Accuracy(top[0], top[1] if len(top) > 1 else None) if top else None

    def change(self, found: Outputs, reference: Outputs) -> Accuracy | None:
        """Return by how much they are right more often than a reference's, paired by image."""
        pairs = zip(self._hits(found), self._hits(reference), strict=True)
        top = [difference(own, other) for own, other in pairs]
        return Accuracy(top[0], top[1] if len(top) > 1 else None) if top else None

    def _hits(self, found: Outputs) -> list[Array]:
        """Return which images with labels are right: the first class, and the first five."""
        if not self.n_labelled(found):
            return []
        assert self.labels is not None
        labels = self.labels[found.indices]
        known, n_classes = labels >= 0, found.values.shape[1]
        tries = [1, 5] if n_classes > 5 else [1]
        return [hits(found.values[known], labels[known], k) for k in tries]

    def run(self, engine: Engine, found: Outputs, reference: Outputs | None) -> Evaluated:
        """Measure what an engine computed.

        Raises: ImageError if the reference is of other images.
        """
        like = None
        if reference:
            if not np.array_equal(found.indices, reference.indices):
                raise ImageError("The images changed while they were read; evaluate again.")
            like = likeness(reference.values, found.values, self.output)
        accuracy = self.accuracy(found)
        what = engine.identity
        return Evaluated(
            str(what["runtime"]), str(what["device"]), str(what["precision"]),
            bool(what["kernels"]), len(found.indices), found.n_kept, accuracy,
            self.change(found, reference) if reference else None, like,
            tuple(self._failures(accuracy, like)),
        )  # fmt: skip

    def _failures(self, accuracy: Accuracy | None, like: Likeness | None) -> Iterator[str]:
        limits = (
            ("top-1 accuracy", accuracy and accuracy.top1, self.min_top1),
            ("top-1 agreement", like and like.top1, self.min_agreement),
        )
        for what, found, limit in limits:
            if found and limit is not None and found.value < limit:
                yield f"{what} is {found.value:.2%}, the limit is {limit:.2%}"


def n_classes(metadata: Metadata, golden: Golden) -> int | None:
    """Return how many classes a file tells apart; None if it gives no classes."""
    return golden.reduced.shape[1] if metadata.output == "logits" else None


def label_array(images: ImageSet) -> Array | None:
    """Return the class of each image, −1 for none; None if no image has one."""
    if images.labels is None:
        return None
    return np.array([-1 if label is None else label for label in images.labels], np.int64)


def _baseline(
    path: Path, metadata: Metadata, backend: Backend, given: str | Path | None
) -> Path | None:
    """Return the unmerged export of a file, if there is one."""
    peer = Path(given) if given else beside(path, NONE)
    if not given and not peer.is_file():
        return None
    require_readable(peer, backend)
    theirs = read_artifact(backend, peer)[0]
    same = {
        "number of tokens removed": (theirs.plan.removed_total, 0),
        "SHA-256 of the weights": (theirs.weights_sha256[:16], metadata.weights_sha256[:16]),
        "input shape": (theirs.input_shape[1:], metadata.input_shape[1:]),
        "output": (theirs.output, metadata.output),
    }
    for what, (found, needed) in same.items():
        if found != needed:
            raise ArtifactError(
                f"{peer} cannot be the unmerged model of {path}: its {what} is {found}, and "
                f"{needed} is needed. Give the right one with --baseline."
            )
    return peer


def _pytorch(path: Path, metadata: Metadata, model: str | Path, arch: str | None) -> Engine:
    """Return the model that a file was exported from, unmerged, in PyTorch."""
    run = pipeline.original(path, model, arch=arch)
    import torch

    identity = {"weights": metadata.weights_sha256, "names": metadata.names, "runtime": "pytorch",
                "version": torch.__version__, "tomexport": __version__}  # fmt: skip
    return Engine(f"{model}, PyTorch", identity, run)
