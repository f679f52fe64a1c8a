"""`search`: trials until the budget is used, then the front, and the file that is taken from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomexport import pipeline, scratch
from tomexport.calib.images import ImageSet, Skipped
from tomexport.calib.search.front import Limits, Measured, on_front
from tomexport.calib.search.measure import INT8, Meter, Prepared, halves, prepare
from tomexport.calib.search.space import EVERY, Choices, Space
from tomexport.calib.search.study import Identity, Study
from tomexport.calib.search.trials import Trier, reading, said_of_lists
from tomexport.delivery import check_output
from tomexport.errors import (
    BackendError,
    PlanError,
    need,
    pick,
)
from tomexport.plan import Plan
from tomexport.runtime.backend import Backend, Request, check_device
from tomexport.runtime.load import BACKENDS, readers
from tomexport.runtime.machine import machine
from tomexport.runtime.profile import cpus_for
from tomexport.runtime.timing import CAN_PIN, Job

if TYPE_CHECKING:
    from torch import nn

    from tomexport.exporter.source import Source

Progress = Callable[[str], None]
TRIALS = 40
_EVALUATIONS = 60  # lists computed for each share of MACs


@dataclass(frozen=True)
class SearchReport:
    """The result of `search`.

    Attributes:
        path: the file; None if no point keeps the limits.
        model: what was searched.
        points: all that was measured on this kind of machine, the fastest first.
        front: for each of them, whether no other beats it.
        chosen: which of them was exported; None if none keeps the limits.
        rule: how it was chosen, in words.
        unmerged: latency_ms, and top-1 accuracy on both halves where there are labels.
        images: which images, in words.
        loss: what the loss is, in words.
        machine: what latencies depend on.
        notes: what the user should know.
    """

    path: str | None
    model: str
    points: tuple[Measured, ...]
    front: tuple[bool, ...]
    chosen: int | None
    rule: str
    unmerged: dict[str, Any]
    images: str
    loss: str
    machine: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether a point keeps the limits."""
        return self.chosen is not None

    def latency_ms(self, point: Measured) -> float:
        """Return the time of a call: the unmerged model's, times the ratio that was measured."""
        return round(float(self.unmerged["latency_ms"]) * point.ratio.value, 4)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        points = [
            point.to_dict() | {
                "latency_ms": self.latency_ms(point), "on_front": front, "chosen": i == self.chosen,
            }
            for i, (point, front) in enumerate(zip(self.points, self.front, strict=True))
        ]  # fmt: skip
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"passed": self.passed} | own | {"points": points}


def search(
    model: str | Path | nn.Module,
    images: ImageSet,
    output: str | Path,
    *,
    held_out: ImageSet | None = None,
    max_latency_ms: float | None = None,
    max_drop: float | None = None,
    max_gmac: float | None = None,
    methods: Sequence[str] = (pipeline.DEFAULT_METHOD,),
    families: Sequence[str] = EVERY,
    precisions: Sequence[str] = ("f32",),
    trials: int | None = None,
    minutes: float | None = None,
    storage: str | None = None,
    arch: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    kernels: str | Path = "auto",
    seconds: float = 4.0,
    evaluations: int = _EVALUATIONS,
    seed: int = 0,
    force: bool = False,
    progress: Progress = lambda message: None,
) -> SearchReport:
    """Find the schedule, method and precision that fit a model, a machine and images best.

    Each trial exports a point, times its file in turns with the unmerged one, and compares what it
    computes of half of the images; what was held out says whether that holds elsewhere. The file of
    the point that is chosen is exported with its proof.

    Usage:
        images = ImageSet.find(Path("photos"), limit=500)
        report = tomexport.search("model.pth", images, "model.onnx", max_drop=0.01)
        report.points[report.chosen].schedule

    Args:
        model: checkpoint file, timm name or module.
        images: at least two; with labels the loss is that of top-1 accuracy, without it is the
            share of images with another first class than the unmerged model gives.
        output: the file to write; .onnx or .xml.
        held_out: images to hold out; then all others are searched on. None draws half of them.
        max_latency_ms: the most that a call may take.
        max_drop: the most loss, as a share, on either of both sets of images. With it the fastest
            point within the limits is chosen, without it the one that loses least.
        max_gmac: the most multiply-accumulates of an image, in 10⁹.
        methods: how tokens are chosen.
        families: kinds of schedules: none, const, linear, exp, keep, list.
        precisions: "f32", "bf16", "int8", …
        trials: stop when the storage holds so many points of this kind of machine; None is 40, or
            no limit with `minutes`.
        minutes: begin no trial after so long.
        storage: a journal file, or the URL of a database, that keeps trials and that processes and
            machines can share; None keeps nothing.
        arch: timm name of a checkpoint's architecture; None finds it.
        backend: the runtime; None is the first that reads the file.
        threads: CPU threads; None takes all.
        kernels: "auto", "off", or the path of a library of fused kernels.
        seconds: time each point for at least so long.
        evaluations: lists to compute for each share of MACs.
        seed: of what is drawn.
        force: replace an existing file.
        progress: is told what is being done.

    Raises: ArtifactError for a storage that is damaged or of another search, ImageError for too few
        images, PlanError or RewriteError for what cannot be reduced, BackendError for what cannot
        run, MissingExtraError without Optuna. What a storage holds stays in it.
    """
    need("optuna", "calib")
    output, limits = Path(output), Limits(max_latency_ms, max_drop, max_gmac)
    check_output(model, output, force)
    _check(limits, trials, minutes, evaluations, seconds)
    runtime = pick("backend", BACKENDS, backend) if backend else readers(output)[0]
    cpus = cpus_for(threads)
    job = Job("", runtime.name, kernels=str(kernels), threads=len(cpus),
              cpus=cpus if CAN_PIN else ())  # fmt: skip
    _check_precisions(precisions, runtime, output.suffix)
    progress("finding the model")
    from tomexport.exporter.source import find

    found = find(model, arch=arch)
    with scratch.folder(Path(tempfile.gettempdir()) / "tomexport") as folder:
        searched, held_out = (images, held_out) if held_out else halves(images)
        meter = Meter(
            found, folder, output.suffix, job, searched, seconds=seconds, progress=progress
        )
        both = (searched.classed(meter.n_classes), held_out.classed(meter.n_classes))
        progress("reading the images")
        prepared = prepare(both, meter.metadata, meter.unmerged)
        setting = _setting(job, runtime.version())
        space = _space(meter.metadata.plan, methods, families, precisions)
        study = Study(
            storage, _identity(found, both, meter, space), setting,
            first=_first(space), seed=seed,
        )  # fmt: skip
        with reading("time of the unmerged model"):
            unmerged_ms = float(study.own_note("unmerged_ms", meter.unmerged_ms))
            if not 0 < unmerged_ms < math.inf:
                raise PlanError(f"{unmerged_ms} ms is none")
        if storage is not None:
            scratch.farewell(f"what was measured is in {storage}; the same command goes on")
        trier = Trier(study, space, meter, prepared, limits, unmerged_ms, evaluations, progress)
        exhausted = trier.run(trials or (TRIALS if minutes is None else None), minutes)
        points, said = _distinct(study), [*said_of_lists(study), *_said_of_refusals(study)]
        best = limits.choose(points, unmerged_ms)
        if best is not None:
            progress(f"exporting {best.schedule}")
            meter.deliver(best.point, output, force=force)
    return SearchReport(
        None if best is None else str(output), found.name, tuple(points), tuple(on_front(points)),
        None if best is None else points.index(best), limits.rule,
        {"latency_ms": unmerged_ms, "gmac": round(meter.metadata.plan.macs_unreduced / 1e9, 4),
         "top1": prepared.search.top1, "held_out_top1": prepared.held_out.top1},
        f"{len(prepared.search.pixels)} searched on, {len(prepared.held_out.pixels)} held out: "
        f"{_sources(both, prepared.skipped)}",
        _loss_in_words(prepared, meter.metadata.output), setting,
        (*found.notes, *dict.fromkeys((*both[0].notes, *both[1].notes)), *said,
         *_notes(best, exhausted)),
    )  # fmt: skip


def _notes(best: Measured | None, exhausted: bool) -> list[str]:
    notes = ["every point of the space was tried"] if exhausted else []
    if best is not None and best.precision not in ("f32", INT8):
        notes.append(f"the file is float32; it was measured with --precision {best.precision}")
    return notes


def _check(
    limits: Limits, trials: int | None, minutes: float | None, evaluations: int, seconds: float
) -> None:
    asked = {"--max-latency-ms": limits.latency_ms, "--max-gmac": limits.gmac,
             "--minutes": minutes, "--trials": trials, "--evaluations": evaluations}  # fmt: skip
    for option, value in asked.items():
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"{option} {value} cannot be kept; use a number above 0.")
    if limits.drop is not None and not 0 <= limits.drop <= 1:
        raise PlanError(f"--max-drop {limits.drop} is no share; 0.01 allows a loss of 1 %.")
    if limits == Limits():
        raise PlanError(
            "Say what the file may cost: --max-drop 0.01 for the fastest that loses at most 1 %, "
            "or --max-latency-ms or --max-gmac for what loses least within it."
        )
    if not 0 <= seconds < math.inf:
        raise PlanError(f"{seconds} seconds is no length of time; use 0 or more.")


def _check_precisions(precisions: Sequence[str], runtime: Backend, suffix: str) -> None:
    """Refuse a precision that the runtime has not, or that no tool writes for it."""
    for precision in precisions:
        if precision != INT8:
            check_device(runtime, Request("CPU", precision=precision))
            continue
        from tomexport.calib.quantize import TOOLS

        own = next(tool.suffix for tool in TOOLS if tool.backend == runtime.name)
        if suffix != own:
            raise BackendError(
                f"int8 for {runtime.name} is written as {own}, not {suffix!r}; name the output so, "
                "or take the other runtime."
            )


def _setting(job: Job, version: str) -> dict[str, Any]:
    """Return what latencies depend on."""
    here = machine()
    kept = {name: here[name] for name in ("system", "cpu", "cores", "flags")}
    return kept | {"backend": job.backend, "version": version, "threads": job.threads,
                   "kernels": job.kernels}  # fmt: skip


def _space(
    plan: Plan, methods: Sequence[str], families: Sequence[str], precisions: Sequence[str]
) -> Space:
    first = plan.steps[0]
    return Space(
        tuple(methods), tuple(dict.fromkeys(families)), tuple(precisions),
        tokens=first.tokens_in - first.n_prefix, n_calls=len(plan.steps),
    )  # fmt: skip


def _first(space: Space) -> list[Choices]:
    """Return what to begin with: nothing merged, and lists, which are most likely to be good.

    Lists of the most MACs come first, so that those at a limit do.
    """
    every = list(space.all())
    lists = [each for each in every if each["family"] == "list" and each["list.macs"] % 3 == 2]
    return [
        *(choices for choices in every if choices["family"] == "none"),
        *sorted(lists, key=lambda choices: -choices["list.macs"]),
    ]


def _sources(both: tuple[ImageSet, ImageSet], skipped: Sequence[Skipped]) -> str:
    """Say which images these are, and which of them could not be read."""
    searched, held_out = both
    if searched.source == held_out.source:
        names, labels = searched.names + held_out.names, searched.labels
        return dataclasses.replace(searched, names=names, labels=labels).described(skipped)
    own = [each for each in skipped if each.name in searched.names]
    rest = [each for each in skipped if each not in own]
    return f"{searched.described(own)}; {held_out.described(rest)}"


def _identity(
    found: Source, both: tuple[ImageSet, ImageSet], meter: Meter, space: Space
) -> Identity:
    judged = {
        "digest": [images.digest(range(len(images))) for images in both],
        "labels": [images.labels for images in both],
        "preprocessing": meter.metadata.preprocessing,
    }
    digest = hashlib.sha256(json.dumps(judged, sort_keys=True).encode()).hexdigest()
    return Identity(found.sha256, digest, space)


def _loss_in_words(prepared: Prepared, output: str) -> str:
    if output != "logits":
        return "1 − cosine with the unmerged model's features"
    if prepared.search.top1 is not None:
        return "top-1 accuracy lost"
    return "images with another first class than the unmerged model gives"


def _said_of_refusals(study: Study) -> list[str]:
    refusals = study.refusals()
    n = len(refusals)
    return [f"{n} points could not be tried, the first: {refusals[0]}"] if n else []


def _distinct(study: Study) -> list[Measured]:
    """Return what was measured, the fastest first; of equal points one."""
    points = {each.point.key: each for each in map(Measured.from_dict, study.results())}
    return sorted(points.values(), key=lambda point: point.ratio.value)
