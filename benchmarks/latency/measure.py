"""One group: load every variant, compare what they compute, let them take turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.latency import files
from benchmarks.latency.cases import (
    BOUND,
    FUSED,
    GPU,
    METHOD_FORMS,
    NAIVE,
    NONE,
    PORTABLE,
    SLICE,
    TIMM,
    TURN_S,
    Group,
    Variant,
)
from benchmarks.latency.gpu import torch_worker
from tomexport.artifact import Array
from tomexport.errors import BackendError, TomexportError
from tomexport.runtime.load import BACKENDS
from tomexport.runtime.machine import usable_cpus
from tomexport.runtime.timing import CAN_PIN, Job, Samples, medians, take_turns, worker

Record = dict[str, Any]
# whose output that of a form must equal; the rewrites' forms, that of NONE
_EQUALS = {TIMM: NONE, PORTABLE: FUSED, NAIVE: PORTABLE, SLICE: BOUND, "without LayerScale": "all"}
_ALONE = (NONE, FUSED, BOUND, "all")


class _LeftOutError(Exception):
    """A group that cannot, or need not, be measured here."""


def measure(
    group: Group,
    folder: Path,
    threads: int,
    seconds: float | None,
    progress: Callable[[str], None],
) -> Record:
    """Measure a group.

    Args:
        group: what to measure; its files are exported first if they are not there.
        folder: of the files.
        threads: of the CPU, each with a CPU to itself.
        seconds: least time of all turns together; None for TURN_S each.
        progress: is told what is being done.

    Returns:
        What the results file holds of it; or why it is left out: there is no such device, or the
        runtime's own precision is float32, which another group measures.
    """
    record: Record = {
        "part": group.part,
        "model": group.model.name,
        "batch": group.batch,
        "runtime": group.runtime.name,
        "schedules": list(group.schedules),
    }
    rounds = math.ceil(group.rounds / group.launches)
    launches: list[list[Samples]] = []
    try:
        for _ in range(group.launches):
            with ExitStack() as stack:
                loaded = _load(group, folder, threads, stack, progress)
                workers = list(loaded.workers.values())
                spare = rounds * len(workers) * TURN_S
                spare = spare if seconds is None else seconds / group.launches
                launches.append(take_turns(workers, rounds, spare, progress))
                held = [(each.peak_memory(), each.call_memory()) for each in workers]
    except _LeftOutError as err:
        return record | {"left_out": str(err)}
    shared = min(len(samples[0]) for samples in launches)  # all launches count alike
    timed = {
        variant: {
            "us": [_microseconds(samples[i][:shared]) for samples in launches],
            "peak_mib": _mebibytes(held[i][0]),
            "call_mib": _mebibytes(held[i][1]),
            "difference": _difference(variant, loaded.outputs),
        }
        for i, variant in enumerate(loaded.workers)
    }
    return record | {
        "engine": loaded.engine,
        "device": group.runtime.device,
        "precision": workers[0].precision,
        "threads": threads if group.runtime.device == "CPU" else None,
        "rounds": shared * group.launches,
        "launches": group.launches,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "variants": [
            {"form": variant.form, "schedule": variant.schedule}
            | (timed.get(variant) or {"refused": loaded.refused[variant]})
            for variant in group.variants
        ],
    }


def _microseconds(samples: Samples) -> list[int]:
    """Return the median of each round."""
    return [round(float(ms) * 1000) for ms in medians(samples)]


def _mebibytes(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else round(n_bytes / 2**20, 1)


@dataclass
class _Loaded:
    """The variants of a group that run, what they compute, and why the others do not run."""

    engine: str
    workers: dict[Variant, Any] = field(default_factory=dict)
    outputs: dict[Variant, Array] = field(default_factory=dict)
    refused: dict[Variant, str] = field(default_factory=dict)


def _load(
    group: Group, folder: Path, threads: int, stack: ExitStack, progress: Callable[[str], None]
) -> _Loaded:
    """Load every variant, a few at a time, and run it once."""
    in_torch = group.runtime is GPU and "CUDA" not in BACKENDS[0].devices()
    if in_torch and not torch.cuda.is_available():
        raise _LeftOutError("no GPU here")
    if not in_torch:
        files.write(folder, group, progress)
    loaded = _Loaded("torch" if in_torch else group.runtime.backend)
    # a process ends with the thread that started it, so the threads must stay until it has ended
    pool = stack.enter_context(ThreadPoolExecutor(1 if in_torch else threads))

    def start(variant: Variant) -> tuple[Any, Array] | str:
        try:
            if in_torch:
                each: Any = torch_worker(group, variant)
            else:
                job = _job(group, variant, files.path(folder, group, variant), threads)
                each = stack.enter_context(worker(job))
            if variant.merged and not each.kernels:
                raise BackendError("no fused kernels here; `tomexport doctor` says why")
            return each, each.output()  # one that loads but cannot run fails here
        except TomexportError as err:
            return str(err).replace(f"{folder}/", "")

    for variant, result in zip(group.variants, pool.map(start, group.variants), strict=True):
        progress(f"loaded {variant.form} {variant.schedule}")
        if isinstance(result, str):
            loaded.refused[variant] = result
            continue
        loaded.workers[variant], loaded.outputs[variant] = result
        if group.runtime.precision is None and result[0].precision == "f32":
            raise _LeftOutError("the runtime's own precision is f32")
    if not loaded.workers:
        raise _LeftOutError(f"nothing runs: {next(iter(loaded.refused.values()))}")
    return loaded


def _job(group: Group, variant: Variant, path: Path, threads: int) -> Job:
    runtime = group.runtime
    on_cpu = runtime.device == "CPU"
    return Job(
        str(path), runtime.backend, runtime.device, runtime.precision, group.batch,
        threads=threads if on_cpu else None,
        kernels="off" if variant.form == PORTABLE else "auto",
        cpus=tuple(usable_cpus()[:threads]) if on_cpu and CAN_PIN else (),
    )  # fmt: skip


def _difference(variant: Variant, outputs: dict[Variant, Array]) -> float | None:
    """Return max |Δ| to the variant that must compute the same, relative where that exceeds 1."""
    if variant.form in _ALONE or variant.form in METHOD_FORMS:
        return None
    twin = Variant(_EQUALS.get(variant.form, NONE), variant.schedule)
    if twin not in outputs:
        return None
    found, expected = outputs[variant], outputs[twin]
    share = np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max()))
    return float(f"{share:.2g}")
