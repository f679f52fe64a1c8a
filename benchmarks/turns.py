"""Files that take turns, each beside the one that it is compared with in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tomexport.runtime.machine import usable_cpus
from tomexport.runtime.timing import CAN_PIN, Interval, Job, medians, take_turns, worker


@dataclass(frozen=True)
class Timed:
    """A file to time: where it lies, its runtime, and a precision; None is the runtime's own."""

    path: Path
    runtime: str
    precision: str | None = "f32"


def speedups(
    files: Mapping[Any, Timed], base: Any, *, launches: int, rounds: int, turn_s: float
) -> dict[Any, dict[str, Any]]:
    """Time files in turns, on two CPUs, batch 1.

    Args:
        files: by any key.
        base: the key of the file that the others are compared with.
        launches: of the processes.
        rounds: of each launch.
        turn_s: seconds of a turn.

    Returns:
        By key: ms, the median call; speedup over base, with its 95 % interval; and us, the median
        of each round, a list for each launch.
    """
    cpus = tuple(usable_cpus()[:2])
    found = []
    for _ in range(launches):
        with ExitStack() as stack:
            jobs = [
                Job(str(each.path), each.runtime, "CPU", each.precision, threads=len(cpus),
                    cpus=cpus if CAN_PIN else ())
                for each in files.values()
            ]  # fmt: skip
            workers = [stack.enter_context(worker(job)) for job in jobs]
            turns = take_turns(workers, rounds, rounds * len(workers) * turn_s)
            found.append([medians(samples)[:rounds] for samples in turns])
    ms = np.array(found)  # (launches, files, rounds)
    reference = ms[:, list(files).index(base)]
    rows = {}
    for i, key in enumerate(files):
        ratio = Interval.of(reference / ms[:, i])
        rows[key] = {
            "ms": round(float(np.median(ms[:, i])), 4), "speedup": ratio.value,
            "speedup_low": ratio.low, "speedup_high": ratio.high,
            "us": (1000 * ms[:, i]).round(1).tolist(),
        }  # fmt: skip
    return rows
