"""What merging costs and what it saves, measured: a file beside its baselines.

The file runs with fused kernels and in standard operators, beside the unmerged export of the same
model (`none`) and the free-merge bound (`bound`: the merged graph with every reduction replaced by
one Slice). `timing` says how they are timed.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tomexport import __version__, scratch
from tomexport.artifact import Array, Metadata
from tomexport.errors import ArtifactError, BackendError
from tomexport.plan import Plan
from tomexport.runtime import baselines
from tomexport.runtime.backend import (
    Backend,
    OperatorTime,
    Request,
    check_device,
    read_artifact,
)  # fmt: skip
from tomexport.runtime.baselines import BOUND, FUSED, NONE, PORTABLE, forms
from tomexport.runtime.load import choose, default_precisions
from tomexport.runtime.machine import machine, usable_cpus
from tomexport.runtime.timing import (
    CAN_PIN,
    CAN_STOP,
    MIN_ROUNDS,
    Interval,
    Job,
    Samples,
    Worker,
    medians,
    take_turns,
    worker,
)  # fmt: skip

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One way to run the model. Times are of all calls, in milliseconds.

    Attributes:
        name: "fused" or "portable": the file, with fused kernels or in standard operators; "none":
            unmerged; "bound": merging replaced by a Slice.
        path: its file.
        calls: how many were timed.
        median_ms, p20_ms, p90_ms, p99_ms, min_ms: of the calls.
        spread: (p90 − p20) / median.
        peak_memory: of the process, in bytes, loading included; None where it is not known.
        speedup: over "none".
        overhead: over "bound", as a share: time / bound − 1.
        us_per_merge: microseconds beyond "bound" for each merge.
        share_of_bound: the speed-up reached, as a share of the one that "bound" shows.
        operators: by total time, for merged variants.
        samples_ms: each call, by round.
    """

    name: str
    path: str
    calls: int
    median_ms: float
    p20_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    spread: float
    peak_memory: int | None
    speedup: Interval | None
    overhead: Interval | None
    us_per_merge: Interval | None
    share_of_bound: Interval | None
    operators: tuple[OperatorTime, ...]
    samples_ms: Samples


@dataclass(frozen=True)
class Run:
    """All variants in one runtime, precision and batch.

    Attributes:
        backend, device, precision: what computed.
        batch: images per call.
        threads: CPU threads; None left to the runtime, on other devices.
        cpus: the CPUs that each process was kept on; empty if the system cannot do that.
        rounds: in which every variant had a turn.
        launches: of the processes, which share the rounds.
        predicted_speedup: by MACs.
        variants: the file first.
        verdict: what can be said, in words.
    """

    backend: str
    device: str
    precision: str
    batch: int
    threads: int | None
    cpus: tuple[int, ...]
    rounds: int
    launches: int
    predicted_speedup: float
    variants: tuple[Variant, ...]
    verdict: str

    @property
    def speedup(self) -> Interval | None:
        """The speed-up of the file as it runs best here, fused where it can be."""
        return self.variants[0].speedup


@dataclass(frozen=True)
class ProfileReport:
    """The result of `profile`.

    Attributes:
        path: the file.
        model, method, schedule: what it is.
        merges: reductions in the file.
        runs: one per runtime, precision and batch.
        min_speedup: what the user requires of every run, or None.
        notes: what could not be done, and how to have it.
        time: when it was measured, in UTC.
        machine, versions: what it was measured on.
    """

    path: str
    model: str
    method: str
    schedule: str
    merges: int
    runs: tuple[Run, ...]
    min_speedup: float | None
    notes: tuple[str, ...]
    time: str
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def failures(self) -> tuple[Run, ...]:
        """The runs that are slower than required."""
        required = self.min_speedup or 0
        return tuple(run for run in self.runs if run.speedup and run.speedup.value < required)

    @property
    def passed(self) -> bool:
        """Whether every run is as fast as required."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return {"passed": self.passed} | dataclasses.asdict(self)


def profile(
    path: str | Path,
    *,
    backends: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    device: str = "CPU",
    batches: Sequence[int] | None = None,
    threads: int | None = None,
    rounds: int = 20,
    launches: int = 3,
    seconds: float = 20,
    baseline: str | Path | None = None,
    bound: str | Path | None = None,
    kernels: str | Path = "auto",
    operators: bool = True,
    min_speedup: float | None = None,
    progress: Progress = lambda message: None,
) -> ProfileReport:
    """Measure what merging costs and saves in a file, beside its baselines.

    Usage:
        report = tomexport.profile("model.onnx", threads=2)
        report.runs[0].verdict

    Args:
        path: an .onnx or .xml file that tomexport wrote.
        backends: the runtimes; None takes all that are installed, read the file and have the
            device and precisions.
        precisions: None takes float32, and the runtime's own default where that differs.
        device: where to run.
        batches: images per call; None takes the file's, or 1.
        threads: CPU threads, and CPUs to keep each process on; None takes all.
        rounds: at least this many turns of each variant.
        launches: of the processes, each for a part of the rounds: two processes of one file can
            differ by some percent for as long as they live.
        seconds: time each runtime, precision and batch for at least so long.
        baseline: the unmerged export; None looks for STEM.none.SUFFIX beside the file.
        bound: the free-merge bound; None looks for STEM.bound.SUFFIX beside the file.
        kernels: "auto", "off", or the path of a library of fused kernels.
        operators: ask the runtime's own profiler too.
        min_speedup: the least speed-up over the baseline that every run must have.
        progress: is told what is being timed.

    Raises: BackendError if something cannot run, ArtifactError if a file is not what it should be,
        MissingExtraError if no runtime is installed. No process is left behind.
    """
    path = Path(path)
    _check_numbers(rounds, launches, seconds, min_speedup)
    cpus = cpus_for(threads)
    chosen, notes = _runtimes(path, backends, device, precisions)
    metadata = read_artifact(chosen[0], path)[0]
    plan, batches = metadata.plan, _batches(path, metadata, batches)
    peers, missing = baselines.find(chosen[0], path, metadata, {NONE: baseline, BOUND: bound})
    if min_speedup is not None and NONE not in peers:
        raise ArtifactError(f"--min-speedup cannot judge {path}: {missing[0]}.")
    case = _Case(
        files=forms(path, metadata, str(kernels))
        | {name: (str(peer), str(kernels)) for name, (peer, _) in peers.items()},
        merges=plan.n_reductions,
        predicted=_computed(peers[NONE][1].plan) / _computed(plan)
        if NONE in peers
        else plan.predicted_speedup,
        rounds=rounds, launches=launches, seconds=seconds, operators=operators,
        progress=progress,
    )  # fmt: skip
    jobs = [
        Job("", backend.name, device, precision, batch,
            threads=len(cpus) if device == "CPU" else None, cpus=cpus if CAN_PIN else ())
        for backend in chosen
        for precision in precisions or default_precisions(backend, device)
        for batch in batches
    ]  # fmt: skip
    runs = tuple(run for job in jobs if (run := case.run(job)))
    return ProfileReport(
        path=str(path), model=plan.model, method=plan.method, schedule=plan.schedule,
        merges=case.merges, runs=runs, min_speedup=min_speedup,
        notes=(*notes, *missing, *_limits(case, runs)),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), machine=machine(),
        versions={"tomexport": __version__, "python": platform.python_version(),
                  **{backend.name: backend.version() for backend in chosen}},
    )  # fmt: skip


@dataclass(frozen=True)
class _Launch:
    """What one launch of every variant gave, by the variant's name."""

    jobs: dict[str, Job]
    precision: str
    samples: dict[str, Samples]
    peaks: dict[str, int | None]


@dataclass(frozen=True)
class _Case:
    """What all runs have in common.

    Attributes:
        files: file and kernels of each variant, the file itself first.
        merges: reductions in the file.
        predicted: speed-up by MACs.
        rounds, launches, seconds, operators, progress: as in `profile`.
    """

    files: dict[str, tuple[str, str]]
    merges: int
    predicted: float
    rounds: int
    launches: int
    seconds: float
    operators: bool
    progress: Progress

    def run(self, job: Job) -> Run | None:
        """Time all variants; None if the runtime's own precision is float32, timed already."""
        what = f"{job.backend} {job.device} {job.precision or 'own precision'}, batch {job.batch}"
        launches = []
        for index in range(self.launches):
            launch = self._launch(job, f"{what}, launch {index + 1} of {self.launches}")
            if launch is None:
                return None
            launches.append(launch)
        jobs = launches[0].jobs
        shared = min(len(turns) for launch in launches for turns in launch.samples.values())
        samples = {  # all launches count alike
            name: [turn for launch in launches for turn in launch.samples[name][:shared]]
            for name in jobs
        }
        peaks = {name: _largest([launch.peaks[name] for launch in launches]) for name in jobs}
        operators = {
            name: self._operators(each, f"{what}: operators of {name}")
            for name, each in jobs.items()
            if name in (FUSED, PORTABLE) and self.operators
        }
        variants = tuple(
            _variant(name, each.path, samples, self.launches, self.merges, peaks[name],
                     operators.get(name, ()))
            for name, each in jobs.items()
        )  # fmt: skip
        return Run(
            job.backend, job.device, launches[0].precision, job.batch, job.threads, job.cpus,
            rounds=shared * self.launches, launches=self.launches,
            predicted_speedup=round(self.predicted, 4), variants=variants,
            verdict=_verdict_of(variants, self.merges, self.predicted),
        )  # fmt: skip

    def _launch(self, job: Job, what: str) -> _Launch | None:
        """Load every variant in a new process, and let them take turns; None as in `run`."""
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for name, (path, kernels) in self.files.items():
                if name in workers:
                    continue
                self.progress(f"{what}: loading {name}")
                variant = dataclasses.replace(job, path=path, kernels=kernels)
                loaded = stack.enter_context(worker(variant))
                if job.precision is None and loaded.precision == "f32":
                    return None
                workers[PORTABLE if name == FUSED and not loaded.kernels else name] = loaded
            timed = take_turns(
                list(workers.values()), math.ceil(self.rounds / self.launches),
                self.seconds / self.launches, lambda message: self.progress(f"{what}: {message}"),
            )  # fmt: skip
            return _Launch(
                {name: each.job for name, each in workers.items()}, loaded.precision,
                dict(zip(workers, timed, strict=True)),
                {name: each.peak_memory() for name, each in workers.items()},
            )  # fmt: skip

    def _operators(self, job: Job, message: str) -> tuple[OperatorTime, ...]:
        """Profile a file in a process of its own: profiling slows it down."""
        self.progress(message)
        with (
            scratch.folder(Path(tempfile.gettempdir()) / "tomexport") as folder,
            worker(dataclasses.replace(job, profile_into=str(folder))) as profiled,
        ):
            return tuple(profiled.operators())


def _largest(peaks: list[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def _variant(
    name: str, path: str, samples: dict[str, Samples], launches: int, merges: int,
    peak_memory: int | None, operators: tuple[OperatorTime, ...],
) -> Variant:  # fmt: skip
    def against(other: str, figure: Callable[[Array, Array], Array]) -> Interval | None:
        if other not in samples or name in (NONE, other):
            return None
        figures = figure(medians(samples[name]), medians(samples[other]))
        return Interval.of(figures.reshape(launches, -1))

    calls = np.concatenate(samples[name])
    p0, p20, p50, p90, p99 = np.percentile(calls, [0, 20, 50, 90, 99]).round(4).tolist()
    return Variant(
        name, path, len(calls),
        median_ms=p50, p20_ms=p20, p90_ms=p90, p99_ms=p99, min_ms=p0,
        spread=round((p90 - p20) / p50, 4),
        peak_memory=peak_memory,
        speedup=against(NONE, lambda own, none: none / own),
        overhead=against(BOUND, lambda own, bound: own / bound - 1),
        us_per_merge=against(BOUND, lambda own, bound: (own - bound) * 1000 / merges),
        share_of_bound=against(BOUND, lambda own, bound: bound / own),
        operators=operators,
        samples_ms=samples[name],
    )  # fmt: skip


def _verdict_of(variants: tuple[Variant, ...], merges: int, predicted: float) -> str:
    """Judge the file as it runs best here."""
    if not merges:
        return "The file merges no tokens, so there is nothing to judge."
    bound = next((each.speedup for each in variants if each.name == BOUND), None)
    return verdict(predicted, variants[0].speedup, variants[0].overhead, bound)


def verdict(
    predicted: float, speedup: Interval | None, overhead: Interval | None, bound: Interval | None
) -> str:
    """Say in words what the intervals allow to say, and no more.

    Args:
        predicted: the speed-up by MACs.
        speedup: over the unmerged model, if it was timed.
        overhead: over the free-merge bound, as a share, if it was timed.
        bound: the bound's own speed-up over the unmerged model, if both were timed.
    """
    return " ".join((_whether_it_pays(predicted, speedup), _what_it_costs(overhead, bound)))


def _whether_it_pays(predicted: float, speedup: Interval | None) -> str:
    if speedup is None:
        return "Whether merging pays cannot be said without the unmerged model."
    found, wanted = times(speedup), f"the {predicted:.2f}× predicted by MACs"
    if speedup.high < 1:
        return f"Merging does not pay: the file is slower than unmerged, {found}, not {wanted}."
    if speedup.low <= 1:
        return f"Merging does not pay, as far as can be told: {found}, not {wanted}."
    if speedup.high < predicted:
        return f"Merging pays, but less than predicted: {found} of {wanted}."
    if speedup.low > predicted:
        return f"Merging pays, and more than predicted: {found}, beyond {wanted}."
    return f"Merging pays as predicted: {found}, which includes {wanted}."


def _what_it_costs(overhead: Interval | None, bound: Interval | None) -> str:
    if overhead is None:
        return "What merging itself costs cannot be said without the free-merge bound."
    if overhead.low > 0:
        cost = f"Merging itself costs {percent(overhead)} over the bound"
    elif overhead.high >= 0:
        cost = f"Merging itself costs nothing that can be told from noise, {percent(overhead)}"
    else:
        cost = f"The file is faster than its free-merge bound, {percent(overhead)}: no bound at all"
    if bound is None:
        return f"{cost}."
    if bound.high < 1:
        return f"{cost}; even free merging would be slower than none: {times(bound)}."
    if bound.low <= 1:
        return f"{cost}; even free merging would not pay that one could tell: {times(bound)}."
    return f"{cost}; free merging would give {times(bound)}."


def times(ratio: Interval) -> str:
    """Write a ratio: "1.23× (1.22–1.24)"."""
    return f"{ratio.value:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})"


def percent(share: Interval) -> str:
    """Write a share: "4.1% (3.8–4.4)"."""
    return f"{share.value * 100:.1f}% ({share.low * 100:.1f}–{share.high * 100:.1f})"


def _check_numbers(rounds: int, launches: int, seconds: float, min_speedup: float | None) -> None:
    if rounds < MIN_ROUNDS:
        raise BackendError(
            f"{rounds} rounds are too few for a 95 % interval; time at least {MIN_ROUNDS}."
        )
    if not 1 <= launches <= rounds:
        raise BackendError(f"{launches} launches cannot share {rounds} rounds; each needs one.")
    if not 0 <= seconds < math.inf:
        raise BackendError(f"{seconds} seconds is no length of time; use 0 or more.")
    if min_speedup is not None and not 0 < min_speedup < math.inf:
        raise BackendError(f"A speed-up of {min_speedup} cannot be required; use 1.2 for instance.")


def cpus_for(threads: int | None) -> tuple[int, ...]:
    """Return the CPUs to use, one for each thread.

    Raises: BackendError if there are not so many.
    """
    usable = usable_cpus()
    if threads is not None and not 1 <= threads <= len(usable):
        raise BackendError(
            f"{threads} threads cannot be timed: this process may use {len(usable)} CPUs, and "
            "threads that share one wait for each other."
        )
    return tuple(usable[:threads])


def _batches(path: Path, metadata: Metadata, wanted: Sequence[int] | None) -> tuple[int, ...]:
    fixed = metadata.input_shape[0]
    for batch in wanted or ():
        if batch < 1 or batch != (fixed or batch):
            takes = "1 image or more" if fixed is None else f"batches of {fixed}"
            raise BackendError(
                f"A batch of {batch} does not fit: {path.name} takes {takes}. Export it with "
                "--batch dynamic to time several."
            )
    return tuple(dict.fromkeys(wanted or (fixed or 1,)))


def _runtimes(
    path: Path, names: Sequence[str] | None, device: str, precisions: Sequence[str] | None
) -> tuple[list[Backend], list[str]]:
    """Return the runtimes to use, and why others are left out; those named must do."""
    chosen = [choose(path, name)[0] for name in dict.fromkeys(names or ())] or choose(path, None)
    able, refusals = [], []
    for backend in chosen:
        try:
            for precision in precisions or (None,):
                check_device(backend, Request(device, precision=precision))
            able.append(backend)
        except BackendError as err:
            if names:
                raise
            refusals.append(str(err))
    if not able:
        raise BackendError(" ".join(refusals))
    return able, refusals


def _computed(plan: Plan) -> int:
    """Return the MACs that a file of this plan computes."""
    return plan.macs - plan.macs_spared


def _limits(case: _Case, runs: tuple[Run, ...]) -> list[str]:
    """Return what this machine could not do."""
    notes = [
        f"{run.backend} {run.device} {run.precision} has no fused kernels here: the file ran in "
        "standard operators"
        for run in runs
        if FUSED in case.files and run.variants[0].name != FUSED
    ]
    if not CAN_STOP:
        notes.append("this system cannot stop the processes that wait: expect more noise")
    if not CAN_PIN:
        notes.append("this system cannot keep a process on certain CPUs: expect more noise")
    return notes
