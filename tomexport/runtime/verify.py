"""Does a file compute what PyTorch computed? Answered anywhere, from the file's golden set."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tomexport.artifact import Array, Golden, Metadata
from tomexport.runtime import fused
from tomexport.runtime.backend import read_artifact
from tomexport.runtime.load import Runner, choose, default_precisions, load


@dataclass(frozen=True)
class Gate:
    """The limits of a check, each with its reason.

    Attributes:
        max_abs: largest difference, relative to the largest output where that is above 1, over
            the images whose tokens merged alike.
        cosine: smallest cosine between outputs of those images.
        near_tie: an image may merge otherwise where PyTorch's own decision was closer than this.
        alike: share of images that must have merged alike, or the check has nothing to judge.
    """

    max_abs: float
    cosine: float
    near_tie: float
    alike: float


# float32: rounding over 12 to 32 blocks measures up to 1e-5, a wrong operator 1e-3 and more; a
# cosine of 0.99999 is what is left of an error of 0.5 %; scores of equal keys differ by up to 1e-6
# between runtimes; natural images seldom tie, so most must have merged alike.
_EXACT = Gate(max_abs=1e-4, cosine=0.99999, near_tie=1e-5, alike=0.5)
# float16 weights: each carries a relative error of 5e-4, which moves scores by as much as 5e-3 and
# outputs by a few per cent; where decisions flip, only the direction of the output can be judged.
_HALF = Gate(max_abs=5e-2, cosine=0.99, near_tie=5e-3, alike=0.0)


@dataclass(frozen=True)
class Run:
    """One runtime, compared with PyTorch's reduced module.

    Attributes:
        backend, device, precision: what computed.
        kernels: whether fused kernels did the merging, or standard operators.
        batch: images per call.
        gated: whether failing counts; lower precisions are only reported.
        images: images compared.
        max_abs, mean_abs: difference of outputs over the images whose tokens merged alike.
        cosine: smallest cosine of outputs over these.
        top1: share of all images with the same first class; None for features.
        decided_otherwise: images in which some token merged otherwise.
        near_ties: those of them in which PyTorch's own decision was a near tie.
        failures: what is wrong, empty if nothing is.
    """

    backend: str
    device: str
    precision: str
    kernels: bool
    batch: int
    gated: bool
    images: int
    max_abs: float
    mean_abs: float
    cosine: float
    top1: float | None
    decided_otherwise: int
    near_ties: int
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing that counts is wrong."""
        return not (self.gated and self.failures)

    @property
    def name(self) -> str:
        """What computed, in words."""
        return f"{self.backend} {self.precision} {'fused' if self.kernels else 'standard'}"


@dataclass(frozen=True)
class Fidelity:
    """What merging itself changes: PyTorch's reduced module against the original.

    Attributes:
        max_abs, mean_abs: difference of outputs.
        cosine: mean cosine of outputs.
        top1: share of images with the same first class; None for features.
    """

    max_abs: float
    mean_abs: float
    cosine: float
    top1: float | None


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        path: the file.
        images: what it was compared on, in words.
        runs: one per runtime, precision and batch.
        fidelity: what merging itself changes.
    """

    path: str
    images: str
    runs: tuple[Run, ...]
    fidelity: Fidelity

    @property
    def passed(self) -> bool:
        """Whether every gated run passed."""
        return all(run.passed for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        data = dataclasses.asdict(self)
        for entry, run in zip(data["runs"], self.runs, strict=True):
            entry["passed"] = run.passed
        return {"passed": self.passed} | data


def verify(
    path: str | Path,
    *,
    backend: str | None = None,
    device: str = "CPU",
    precision: str | None = None,
    kernels: str | Path = fused.AUTO,
    golden: Golden | None = None,
    images: str = "golden set",
    progress: Callable[[str], None] = lambda message: None,
) -> VerifyReport:
    """Compare a file with what PyTorch computed.

    Args:
        path: an .onnx or .xml file that tomexport wrote.
        backend: the runtime; None takes all that are installed and read the file.
        device: where to run.
        precision: only this one; None takes float32, gated, and the runtime's default, reported.
        kernels: "auto" compares fused kernels, where they can be had, and standard operators,
            "off" standard operators only; or the path of a library to compare.
        golden: what PyTorch computed; None takes the file's own golden set.
        images: what to call the images of `golden`.
        progress: is told what is being compared.

    Raises: BackendError or MissingExtraError if nothing can run the file, ArtifactError if it
        carries nothing to compare with.
    """
    path = Path(path)
    backends = choose(path, backend)
    metadata, own = read_artifact(backends[0], path)
    golden = own if golden is None else golden
    gate = _HALF if metadata.half else _EXACT
    runs: list[Run] = []
    forms = _forms(path, fused.choice(kernels, device), device)
    for chosen, form in itertools.product(backends, forms):
        for wanted in [precision] if precision else default_precisions(chosen, device):
            runner = None  # the last one holds weights
            runner = load(
                path, chosen.name, device, None, wanted,
                kernels=form, extra_outputs=metadata.decisions,
            )  # fmt: skip
            if form == fused.AUTO and len(forms) > 1 and not runner.kernels:
                continue  # there are none: standard operators come next
            is_f32 = runner.precision == "f32"
            gated = is_f32 and metadata.quantization is None
            if wanted is None and is_f32:
                continue  # the default is float32, which was compared already
            batches = list(_batches(runner, len(golden.images)))
            for batch in batches if is_f32 else batches[-1:]:
                progress(f"{chosen.name} {device} {runner.precision}, batch {batch}")
                runs.append(_compare(runner, golden, metadata, batch, gate, gated))
    return VerifyReport(str(path), images, tuple(runs), _fidelity(golden, metadata.output))


def _forms(path: Path, kernels: str | Path, device: str) -> tuple[str | Path, ...]:
    """Return how to load a file: fused kernels and standard operators, or the one it can do."""
    if not fused.has_own_nodes(path):
        return (fused.OFF,)
    if path.suffix == ".xml":
        return (kernels,)
    return (fused.OFF,) if kernels == fused.OFF or device != "CPU" else (kernels, fused.OFF)


def _batches(runner: Runner, n_images: int) -> Iterable[int]:
    fixed = runner.input_shape[0]
    return (fixed,) if fixed is not None else sorted({1, 3, n_images})


def run_all(runner: Runner, images: Array, batch: int) -> list[Array]:
    """Run any number of images in batches; the last is filled up with its last image."""
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        if runner.input_shape[0] is not None and len(part) < batch:
            part = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        parts.append([out[: len(images) - start] for out in runner.outputs(part)])
    return [np.concatenate(outs) for outs in zip(*parts, strict=True)]


def _compare(
    runner: Runner, golden: Golden, metadata: Metadata, batch: int, gate: Gate, gated: bool
) -> Run:
    output, *targets = run_all(runner, golden.images, batch)
    otherwise, near_tie = _decisions(targets, golden, gate.near_tie)
    same = ~otherwise
    difference = np.abs(output.astype(np.float64) - golden.reduced)
    cosine = _cosine(output, golden.reduced)
    judged = same if same.any() else np.ones_like(same)
    run = Run(
        backend=runner.backend,
        device=runner.device,
        precision=runner.precision,
        kernels=runner.kernels,
        batch=batch,
        gated=gated,
        images=len(output),
        max_abs=float(difference[judged].max()),
        mean_abs=float(difference[judged].mean()),
        cosine=float(cosine[judged].min()),
        top1=_top1(output, golden.reduced, metadata.output),
        decided_otherwise=int(otherwise.sum()),
        near_ties=int(near_tie.sum()),
        failures=(),
    )
    return dataclasses.replace(run, failures=_failures(run, golden.reduced, gate) if gated else ())


def _failures(run: Run, reference: Array, gate: Gate) -> tuple[str, ...]:
    scale = max(1.0, float(np.abs(reference).max()))
    limit = gate.max_abs * scale
    wrong = run.decided_otherwise - run.near_ties
    n_same = run.images - run.decided_otherwise
    failures = []
    if not run.max_abs <= limit:  # also catches NaN
        failures.append(f"outputs differ by {run.max_abs:.3g}, the limit is {limit:.3g}")
    if not run.cosine >= gate.cosine:
        failures.append(f"cosine {run.cosine:.6f}, the limit is {gate.cosine}")
    if wrong:
        failures.append(
            f"{wrong} of {run.images} images merged other tokens, where PyTorch's choice was "
            f"clear by more than {gate.near_tie:g}"
        )
    if n_same < gate.alike * run.images:
        failures.append(f"only {n_same} of {run.images} images merged alike, too few to judge")
    return tuple(failures)


def _decisions(targets: list[Array], golden: Golden, near_tie: float) -> tuple[Array, Array]:
    """Return which images merged otherwise, and which of these had a near tie to excuse it.

    Only the first reduction that differs is judged: after it, the tokens are no longer the same.
    """
    n_images = len(golden.images)
    otherwise, excused = np.zeros(n_images, bool), np.zeros(n_images, bool)
    for found, expected, margins in zip(targets, golden.targets, golden.margins, strict=True):
        differs = (found != expected).any(axis=1) & ~otherwise
        excused |= differs & (margins <= near_tie)
        otherwise |= differs
    return otherwise, excused


def _cosine(a: Array, b: Array) -> Array:
    """Compare image by image; tokens of an image are one long vector."""
    a, b = (each.astype(np.float64).reshape(len(each), -1) for each in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (lengths == 0) & (np.abs(a - b).max(axis=1) == 0)
    dots = (a * b).sum(axis=1)
    cosine: Array = np.where(both_zero, 1.0, dots / np.where(lengths == 0, 1.0, lengths))
    return cosine


def _top1(a: Array, b: Array, output: str) -> float | None:
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean()) if output == "logits" else None


def _fidelity(golden: Golden, output: str) -> Fidelity:
    difference = np.abs(golden.reduced.astype(np.float64) - golden.original)
    return Fidelity(
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        cosine=float(_cosine(golden.reduced, golden.original).mean()),
        top1=_top1(golden.reduced, golden.original, output),
    )
