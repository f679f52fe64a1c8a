"""`search`: trials until the budget is used, then the front, and the file that is taken from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomexport import pipeline, scratch
from tomexport.calib.images import ImageSet
from tomexport.calib.search.front import Limits, Measured, on_front
from tomexport.calib.search.measure import INT8, Meter, Prepared, prepare
from tomexport.calib.search.space import EVERY, Choices, Point, Space
from tomexport.calib.search.study import Claimed, Identity, Study
from tomexport.delivery import check_output
from tomexport.errors import (
    ArtifactError,
    BackendError,
    ImageError,
    PlanError,
    RewriteError,
    need,
    pick,
    plain,
)
from tomexport.plan import Plan, Schedule
from tomexport.runtime.backend import Backend, Request, check_device
from tomexport.runtime.load import BACKENDS, readers
from tomexport.runtime.machine import machine
from tomexport.runtime.profile import cpus_for
from tomexport.runtime.timing import CAN_PIN, Job

if TYPE_CHECKING:
    from torch import nn

    from tomexport.calib.search.lists import Found
    from tomexport.exporter.source import Source

Progress = Callable[[str], None]
TRIALS = 40
_LIST = "list of"  # what notes of lists start with in a storage
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
    computes of half of the images; the other half says whether that holds elsewhere. The file of
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
        max_latency_ms: the most that a call may take.
        max_drop: the most loss, as a share, on either half of the images. With it the fastest
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
    _check(limits, trials, minutes, len(images), seconds)
    runtime = pick("backend", BACKENDS, backend) if backend else readers(output)[0]
    cpus = cpus_for(threads)
    job = Job("", runtime.name, kernels=str(kernels), threads=len(cpus),
              cpus=cpus if CAN_PIN else ())  # fmt: skip
    _check_precisions(precisions, runtime, output.suffix)
    progress("finding the model")
    from tomexport.exporter.source import find

    found = find(model, arch=arch)
    with scratch.folder(Path(tempfile.gettempdir()) / "tomexport") as folder:
        even = images.take(range(0, len(images), 2))  # those that are searched on
        meter = Meter(found, folder, output.suffix, job, even, seconds=seconds, progress=progress)
        progress("reading the images")
        prepared = prepare(images, meter.metadata, meter.unmerged)
        setting = _setting(job, runtime.version())
        space = _space(meter.metadata.plan, methods, families, precisions)
        study = Study(
            storage, _identity(found, images, meter, space), setting,
            first=_first(space), seed=seed,
        )  # fmt: skip
        unmerged_ms = study.own_note("unmerged_ms", meter.unmerged_ms)
        trier = _Trier(
            study, space, meter, prepared, limits, unmerged_ms, found, evaluations, progress
        )
        exhausted = trier.run(trials or (TRIALS if minutes is None else None), minutes)
        points, said = _distinct(study), [*_said_of_lists(study), *_said_of_refusals(study)]
        best = limits.choose(points, unmerged_ms)
        if best is not None:
            progress(f"exporting {best.schedule}")
            meter.deliver(best.point, output, force=force)
    return SearchReport(
        None if best is None else str(output), found.name, tuple(points), tuple(on_front(points)),
        None if best is None else points.index(best), limits.rule,
        {"latency_ms": unmerged_ms, "gmac": round(meter.metadata.plan.macs_unreduced / 1e9, 4),
         "top1": prepared.search.top1, "held_out_top1": prepared.held_out.top1},
        f"{images.described(prepared.skipped)}: {len(prepared.search.pixels)} searched on, "
        f"{len(prepared.held_out.pixels)} held out",
        _loss_in_words(prepared, meter.metadata.output), setting,
        (*found.notes, *said, *_notes(best, exhausted)),
    )  # fmt: skip


def _notes(best: Measured | None, exhausted: bool) -> list[str]:
    notes = ["every point of the space was tried"] if exhausted else []
    if best is not None and best.precision not in ("f32", INT8):
        notes.append(f"the file is float32; it was measured with --precision {best.precision}")
    return notes


def _check(
    limits: Limits, trials: int | None, minutes: float | None, n_images: int, seconds: float
) -> None:
    asked = {"--max-latency-ms": limits.latency_ms, "--max-gmac": limits.gmac,
             "--minutes": minutes, "--trials": trials}  # fmt: skip
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
    if n_images < 2:
        raise ImageError("One image cannot be searched on and held out as well; give two or more.")


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
    """Return what to begin with: nothing merged, and lists, which are most likely to be good."""
    every = [choices for choices in space.all() if choices["family"] in ("none", "list")]
    return [
        choices for choices in every
        if choices["family"] == "none" or choices["list.macs"] % 3 == 2
    ]  # fmt: skip


def _identity(found: Source, images: ImageSet, meter: Meter, space: Space) -> Identity:
    judged = {
        "digest": images.digest(range(len(images))),
        "labels": images.labels,
        "preprocessing": meter.metadata.preprocessing,
    }
    digest = hashlib.sha256(json.dumps(judged, sort_keys=True).encode()).hexdigest()
    return Identity(found.sha256, digest, space)


def _loss_in_words(prepared: Prepared, output: str) -> str:
    if output != "logits":
        return "1 − cosine with the unmerged model's features"
    if prepared.search.top1 is not None:
        return "top-1 accuracy lost"
    return "share of images with another first class than the unmerged model's"


def _read_list(key: str, noted: Any) -> Found:
    from tomexport.calib.search.lists import Found

    try:
        found = Found(**noted)
        Schedule.parse(found.schedule)
        float(found.loss), float(found.exponential_loss)
    except (TypeError, ValueError, AttributeError, PlanError) as err:
        raise ArtifactError(
            f"The {key} in the storage is damaged ({plain(err)}); name another storage."
        ) from err
    return found


def _said_of_lists(study: Study) -> list[str]:
    """Say whether lists were better than exponential schedules of the same MACs."""
    found = [_read_list(key, noted) for key, noted in study.notes(_LIST).items()]
    nearer = sum(each.loss < each.exponential_loss for each in found)
    said = (
        f"at {nearer} of {len(found)} budgets of MACs the list that was found is nearer to the "
        "unmerged outputs than the best exponential schedule"
    )
    return [said] if found else []


def _said_of_refusals(study: Study) -> list[str]:
    refusals = study.refusals()
    n = len(refusals)
    return [f"{n} points could not be tried, the first: {refusals[0]}"] if n else []


def _distinct(study: Study) -> list[Measured]:
    """Return what was measured, the fastest first; of equal points one."""
    points = {each.point.key: each for each in map(Measured.from_dict, study.results())}
    return sorted(points.values(), key=lambda point: point.ratio.value)


class _Trier:
    """Takes one trial after the other."""

    def __init__(
        self, study: Study, space: Space, meter: Meter, images: Prepared, limits: Limits,
        unmerged_ms: float, found: Source, evaluations: int, progress: Progress,
    ) -> None:  # fmt: skip
        self._study, self._space, self._meter, self._images = study, space, meter, images
        self._limits, self._unmerged_ms, self._found = limits, unmerged_ms, found
        self._evaluations, self._progress = evaluations, progress
        from tomexport.exporter.families import family_of

        self._cost = family_of(found.model).cost(found.model, found.name)
        self._methods = {name: pipeline.method_of(found, name) for name in space.methods}

    def run(self, trials: int | None, minutes: float | None) -> bool:
        """Go on until the budget is used; return whether everything has been tried before."""
        end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            done = self._study.n_taken()
            if trials is not None and done >= trials:
                return False
            claimed = self._study.claim(self._describe)
            if claimed is None:
                return True
            of = "" if trials is None else f" of {trials}"
            schedule = self._space.schedule(claimed.choices)
            self._progress(f"trial {done + 1}{of}: {schedule}")
            self._try(claimed)
        return False

    def _try(self, claimed: Claimed) -> None:
        try:
            point = self._point(claimed.choices)
            measured = self._known(point) or self._meter.measure(point, self._images)
        except (PlanError, RewriteError) as err:
            self._study.refuse(claimed, str(err))
            return
        except BaseException:
            self._study.drop(claimed)
            raise
        excess = self._limits.excess(measured, self._unmerged_ms)
        values = (measured.ratio.value, measured.loss)
        self._study.finish(claimed, measured.to_dict(), values, excess)

    def _known(self, point: Point) -> Measured | None:
        """Return what this kind of machine has measured of the same point under another name."""
        results = map(Measured.from_dict, self._study.results())
        return next((each for each in results if each.point.key == point.key), None)

    def _describe(self, choices: Choices) -> str | None:
        """Return what the same points have in common; None for what cannot be or is too much."""
        if choices["family"] == "list":
            return f"{choices['precision']} {self._list_key(choices)}"
        try:
            point = self._planned(choices, self._space.schedule(choices))
        except PlanError:
            return None
        too_much = self._limits.gmac is not None and point.gmac > self._limits.gmac
        return None if too_much and choices["family"] != "none" else point.key

    def _planned(self, choices: Choices, schedule: str) -> Point:
        method = self._methods[choices["method"]]
        plan = Plan.make(self._cost, Schedule.parse(schedule), method.name, method.counting)
        return Point.of(plan, choices["precision"])

    def _point(self, choices: Choices) -> Point:
        if choices["family"] == "list":
            return self._planned(choices, self._list(choices).schedule)
        return self._planned(choices, self._space.schedule(choices))

    def _budget(self, choices: Choices) -> int:
        """Return the MACs of a list: its share of all, or the limit if that is less."""
        most = self._meter.metadata.plan.macs_unreduced
        limit = math.inf if self._limits.gmac is None else self._limits.gmac * 1e9
        return int(min(limit, self._space.share(choices) * most))

    def _list_key(self, choices: Choices) -> str:
        return f"{_LIST} {choices['method']}, {self._budget(choices)} MACs"

    def _list(self, choices: Choices) -> Found:
        """Return the best list for a share of the MACs, searched unless the storage has it."""
        key = self._list_key(choices)
        if key not in self._study.notes(key):
            self._study.write_note(key, dataclasses.asdict(self._search_list(choices)))
        return _read_list(key, self._study.notes(key)[key])

    def _search_list(self, choices: Choices) -> Found:
        from tomexport.calib.search import lists

        method, half = choices["method"], self._images.search
        rules = lists.Arithmetic(self._cost, self._methods[method].counting)
        bench = lists.Bench(
            lambda schedule: pipeline.reduce(self._found, schedule, method=method),
            half.pixels, half.outputs,
        )  # fmt: skip
        return lists.search_list(
            bench, rules, self._budget(choices), evaluations=self._evaluations,
            progress=self._progress,
        )  # fmt: skip
