"""Time files against one another, on a machine whose speed changes by the second.

Each file runs in a process of its own, and one process runs at a time: those that wait are
stopped. They take turns of a fraction of a second in rotating order, and files are compared within
a round only, so that a change of clock or a busy neighbour meets all of them alike. A figure is
the median over the rounds, with a 95 % interval from a bootstrap of the rounds.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tomexport import scratch
from tomexport.artifact import Array, golden_images
from tomexport.errors import BackendError, TomexportError, pick, plain
from tomexport.runtime import fused
from tomexport.runtime.backend import OperatorTime, Request
from tomexport.runtime.load import BACKENDS, require_readable

CAN_STOP = hasattr(signal, "SIGSTOP")
CAN_PIN = hasattr(os, "sched_setaffinity")
MIN_ROUNDS = 6  # fewer do not hold a 95 % interval: all lie on one side once in 2⁵ draws
TURN_S = 0.2  # short, so that the machine hardly changes within a round
WARM_UP_S = 1.0
LONG_CALL_S = 0.25  # beside such a call it costs nothing to bring the caches back
_N_BOOTSTRAP = 2000
_N_PROFILED = 20  # calls

Samples = list[list[float]]  # milliseconds of each call, by round


@dataclass(frozen=True)
class Job:
    """A file and how to run it.

    Attributes:
        path: the file; it need not be of tomexport.
        backend, device, precision, threads, kernels: as `load` takes them.
        batch: images per call.
        cpus: the CPUs to stay on, where the system can do that; empty for any.
        profile_into: a folder to profile operators in, instead of timing calls; None times.
    """

    path: str
    backend: str
    device: str = "CPU"
    precision: str | None = None
    batch: int = 1
    threads: int | None = None
    kernels: str = "auto"
    cpus: tuple[int, ...] = ()
    profile_into: str | None = None


@dataclass(frozen=True)
class Interval:
    """The median of a figure over the rounds, and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: NDArray[np.float64]) -> Interval:
        """Take the median of figures; bootstrap its interval.

        Args:
            figures: (rounds,), or (launches, rounds) where the processes were launched anew: a
                process can be some percent slower than another of the same file for as long as it
                lives, so launches are drawn first and then rounds of each.
        """
        launches = np.atleast_2d(figures)
        n_launches, n_rounds = launches.shape
        random = np.random.default_rng(0)
        launch = random.integers(n_launches, size=(_N_BOOTSTRAP, n_launches, 1))
        drawn = launches[launch, random.integers(n_rounds, size=(*launch.shape[:2], n_rounds))]
        low, high = np.percentile(np.median(drawn, axis=(1, 2)), [2.5, 97.5])
        return cls(*(round(float(x), 5) for x in (np.median(figures), low, high)))


def medians(samples: Samples) -> NDArray[np.float64]:
    """Return the median of each round, in milliseconds."""
    return np.array([np.median(turn) for turn in samples])


class Worker:
    """A process that has loaded a file, and stands still until it is asked.

    Attributes:
        job: the file and how it runs.
        precision: what the file computes in.
        kernels: whether fused kernels are in use.
    """

    def __init__(self, process: subprocess.Popen[str], job: Job) -> None:
        self._process = process
        self.job = job
        loaded = self._ask("load", asdict(job))
        self.precision: str = loaded["precision"]
        self.kernels: bool = loaded["kernels"]

    def time(self, seconds: float) -> list[float]:
        """Return the milliseconds of calls that took so long together; of one call at least."""
        times: list[float] = self._ask("time", seconds)
        return times

    def operators(self) -> list[OperatorTime]:
        """Return what the runtime's own profiler says of each operator."""
        return [OperatorTime(**entry) for entry in self._ask("operators", _N_PROFILED)]

    def output(self) -> NDArray[np.float32]:
        """Return what it computes of the images that it is timed with: (batch, classes)."""
        return np.array(self._ask("output", None), np.float32)

    def peak_memory(self) -> int | None:
        """Return the most memory that the process has held so far, in bytes."""
        peak: int | None = self._ask("peak_memory", None)
        return peak

    def call_memory(self) -> int | None:
        """Return the most memory that calls have held beyond what was held before the first.

        In bytes: the network's intermediate results, and what the runtime keeps for them.
        """
        held: int | None = self._ask("call_memory", None)
        return held

    def _ask(self, what: str, value: Any) -> Any:
        """Resume the process, have it answer one request, and stop it again."""
        self._send("SIGCONT")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([what, value]) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as err:
            raise BackendError(
                f"The process that timed {self.job.path} in {self.job.backend} ended "
                f"(exit code {self._process.wait()}); memory may be short."
            ) from err
        self._send("SIGSTOP")
        if "error" in answer:
            raise BackendError(answer["error"])
        return answer["result"]

    def _send(self, name: str) -> None:
        if CAN_STOP:
            self._process.send_signal(getattr(signal, name))


@contextmanager
def worker(job: Job) -> Iterator[Worker]:
    """Load a file in a process that ends with the block, however that ends.

    Raises: BackendError if it cannot be loaded.
    """
    code = f"import sys; sys.path = {sys.path!r}; from {__name__} import work; work({os.getpid()})"
    with scratch.process([sys.executable, "-c", code]) as process:
        yield Worker(process, job)


def take_turns(
    workers: Sequence[Worker],
    rounds: int,
    seconds: float,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Samples]:
    """Time workers in turns.

    Args:
        workers: what to time.
        rounds: at least this many, with one turn of each worker.
        seconds: go on for at least this long; turns are shorter than usual if the rounds need it.
        progress: is told how far it is.

    Raises: BackendError if a worker fails or ends.
    """
    for each in workers:
        each.time(min(WARM_UP_S, seconds / 10))
    turn = min(TURN_S, seconds / rounds / len(workers))
    samples: list[Samples] = [[] for _ in workers]
    end = time.monotonic() + seconds
    while (done := len(samples[0])) < rounds or time.monotonic() < end:
        progress(f"round {done + 1}, {max(0.0, end - time.monotonic()):.0f} s to go")
        first = done % len(workers)
        for i in (*range(first, len(workers)), *range(first)):
            samples[i].append(workers[i].time(turn))
    return samples


def work(parent: int) -> None:
    """Be a worker: answer each line of stdin with a line of JSON."""
    _end_with(parent)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    bench = _Bench()
    for line in sys.stdin:
        what, value = json.loads(line)
        try:
            answer = {"result": getattr(bench, what)(value)}
        except (TomexportError, OSError) as err:
            answer = {"error": str(err)}
        answers.write(json.dumps(answer) + "\n")


def _end_with(parent: int) -> None:
    """Let no worker, stopped or not, outlive its parent, even one that is killed."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that was in force
        os._exit(1)


class _Bench:
    """What a worker answers: one method for each request."""

    call_s = 0.0  # of the last call

    def load(self, value: dict[str, Any]) -> dict[str, Any]:
        self.job = job = Job(**value | {"cpus": tuple(value["cpus"])})
        if job.cpus and CAN_PIN:
            os.sched_setaffinity(0, job.cpus)  # before a runtime counts them
        backend, path = pick("backend", BACKENDS, job.backend), Path(job.path)
        require_readable(path, backend)
        kernels = fused.choice(job.kernels, job.device)
        request = Request(
            job.device, job.threads, job.precision, kernels=kernels, profile_into=job.profile_into
        )
        self.session = backend.compile(path, request)
        _, channels, height, width = self.session.input_shape
        assert channels
        assert height
        assert width
        self.images = golden_images((channels, height, width), job.batch)
        self.loading_peak, self.loaded = _peak_memory(), _restart_peak()
        return {"precision": self.session.precision, "kernels": self.session.kernels}

    def time(self, seconds: float) -> list[float]:
        start = time.monotonic()
        for _ in range(2):  # bring the caches back; one call will do if it fills the turn
            if self.call_s >= LONG_CALL_S:
                break
            self._run()
            if time.monotonic() - start >= seconds:
                break
        times: list[float] = []
        end = time.monotonic() + seconds
        while not times or time.monotonic() < end:
            self._run()
            times.append(round(self.call_s * 1e3, 4))
        return times

    def output(self, _: None) -> list[list[float]]:
        output: list[list[float]] = self._run()[0].tolist()
        return output

    def operators(self, calls: int) -> list[dict[str, Any]]:
        for _ in range(calls):
            self._run()
        return [asdict(entry) for entry in self.session.operators()]

    def peak_memory(self, _: None) -> int | None:
        peak = _peak_memory()
        return peak and max(peak, self.loading_peak or 0)

    def call_memory(self, _: None) -> int | None:
        peak = _peak_memory()
        return None if peak is None or self.loaded is None else max(0, peak - self.loaded)

    def _run(self) -> list[Array]:
        start = time.perf_counter()
        try:
            outputs = self.session.run(self.images)
        except Exception as err:
            raise BackendError(
                f"{self.job.backend} failed while it ran {self.job.path}: {plain(err)}"
            ) from err
        self.call_s = time.perf_counter() - start
        return outputs


def _peak_memory() -> int | None:
    """Read the system's high-water mark; Linux's rusage counts the parent's memory at the fork."""
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    mark = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(mark[1]) * 1024 if mark else None


def _restart_peak() -> int | None:
    """Let the high-water mark start again from what is held now, and return that; Linux only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed would hide what calls take
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # another C library, or another system
        return None
    return _peak_memory()
