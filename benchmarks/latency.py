"""Compare the latency of exported files fairly, on a machine whose speed changes by the second.

    python benchmarks/latency.py unmerged.onnx merged.onnx --threads 2

Each file runs in a process of its own, and one process runs at a time: those that wait are
stopped. They take turns of a fraction of a second in rotating order, and files are compared within
a round only, so that a change of clock or a busy neighbour meets all of them alike. The speed-up is
the median over the rounds of baseline ÷ file, with a 95 % interval from a bootstrap of the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import tomexport
from tomexport.artifact import N_GOLDEN, golden_images
from tomexport.errors import ArtifactError, BackendError, TomexportError, pick
from tomexport.runtime.backend import read_artifact
from tomexport.runtime.doctor import diagnose
from tomexport.runtime.load import BACKENDS

WARM_UP_S = 1.0  # after loading
TURN_S = 0.2  # short, so that the machine hardly changes within a round
N_BOOTSTRAP = 10_000
CAN_STOP = hasattr(signal, "SIGSTOP")


@dataclass(frozen=True)
class Variant:
    """A file and how to run it; None leaves the choice to the runtime or the file."""

    path: str
    backend: str | None = None
    precision: str | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Result:
    """What was measured of a variant, times by round; plan and difference if tomexport wrote it."""

    path: str
    backend: str
    precision: str
    batch: int
    plan: dict[str, Any] | None  # model, method, schedule and MACs
    max_abs_diff: float | None  # from what PyTorch computed
    speedup: float
    speedup_low: float
    speedup_high: float
    speedup_by_macs: float | None  # what the multiplications saved would give
    samples_ms: list[list[float]]

    def summary(self) -> dict[str, float]:
        """Return median, 20th and 90th percentile and minimum of all calls, in milliseconds."""
        calls = np.concatenate(self.samples_ms)
        names = {"median_ms": 50, "p20_ms": 20, "p90_ms": 90, "min_ms": 0}
        return {name: round(float(np.percentile(calls, q)), 4) for name, q in names.items()}


def compare(
    variants: Sequence[Variant], rounds: int = 20, seconds: float = 20, threads: int | None = None
) -> list[Result]:
    """Time variants in turns, the first being the baseline.

    Args:
        variants: what to time.
        rounds: at least this many, with one turn of each variant.
        seconds: go on for at least this long; loading does not count.
        threads: CPU threads of each variant; None leaves it to the runtime.

    Raises: BackendError if a variant cannot be loaded or ends early. No process is left behind.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker()) for _ in variants]
        loaded = [
            _ask(worker, {"variant": asdict(variant), "threads": threads})
            for worker, variant in zip(workers, variants, strict=True)
        ]
        base = loaded[0]["plan"]
        samples: list[list[list[float]]] = [[] for _ in variants]
        end = time.monotonic() + seconds
        while len(samples[0]) < rounds or time.monotonic() < end:
            first = len(samples[0]) % len(workers)
            for i in (*range(first, len(workers)), *range(first)):
                samples[i].append(_ask(workers[i], TURN_S))
    return [
        Result(
            **what,
            **_speedup(samples[0], own),
            speedup_by_macs=what["plan"] and base and base["macs"] / what["plan"]["macs"],
            samples_ms=own,
        )
        for what, own in zip(loaded, samples, strict=True)
    ]


def _speedup(baseline: list[list[float]], own: list[list[float]]) -> dict[str, float]:
    pairs = zip(baseline, own, strict=True)
    ratios = np.array([np.median(theirs) / np.median(ours) for theirs, ours in pairs])
    drawn = np.random.default_rng(0).integers(len(ratios), size=(N_BOOTSTRAP, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    values = {"speedup": np.median(ratios), "speedup_low": low, "speedup_high": high}
    return {name: round(float(value), 4) for name, value in values.items()}


@contextmanager
def _worker() -> Iterator[subprocess.Popen[str]]:
    """Start a process that ends with the block, however that ends."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the workers
    )  # fmt: skip
    try:
        yield process
    finally:
        _send(process, "SIGCONT")
        process.kill()
        process.communicate()


def _send(process: subprocess.Popen[str], name: str) -> None:
    if CAN_STOP:
        process.send_signal(getattr(signal, name))


def _ask(process: subprocess.Popen[str], request: Any) -> Any:
    """Resume a worker, have it answer one request, and stop it again."""
    _send(process, "SIGCONT")
    try:
        print(json.dumps(request), file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline() if process.stdout else "")
    except (OSError, ValueError) as err:
        raise BackendError("A process that was being timed ended; is memory short?") from err
    _send(process, "SIGSTOP")
    if "error" in answer:
        raise BackendError(answer["error"])
    return answer


def _work() -> None:
    """Be a worker: answer the first line of stdin with what was loaded, the others with times."""
    if sys.platform == "linux":  # even if the parent is killed, no stopped process outlives it
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    request = json.loads(sys.stdin.readline())
    try:
        what, call = _load(Variant(**request["variant"]), request["threads"])
    except (TomexportError, OSError) as err:
        print(json.dumps({"error": str(err)}), file=answers)
        return
    print(json.dumps(what), file=answers)
    for line in sys.stdin:
        print(json.dumps(_time(call, float(line))), file=answers)


def _load(variant: Variant, threads: int | None) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Load a file, compare its output with the golden set, and warm it up."""
    path, backend, precision, batch = astuple(variant)
    model = tomexport.load(path, backend, threads=threads, precision=precision)
    batch = batch or model.input_shape[0] or 1
    images = golden_images(model.input_shape[1:], batch)
    output = model(images)
    try:
        metadata, golden = read_artifact(pick("backend", BACKENDS, model.backend), Path(path))
        plan = {key: getattr(metadata.plan, key) for key in ("model", "method", "schedule", "macs")}
        diff = float(abs(output[:N_GOLDEN] - golden.reduced[:batch]).max())
    except ArtifactError:
        plan, diff = None, None
    _time(lambda: model(images), WARM_UP_S)
    ran = {"path": path, "backend": model.backend, "precision": model.precision, "batch": batch}
    return ran | {"plan": plan, "max_abs_diff": diff}, lambda: model(images)


def _time(call: Callable[[], Any], seconds: float) -> list[float]:
    """Return the milliseconds of each call; two more go first, to bring the caches back."""
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < end:
        start = time.perf_counter()
        call()
        times.append(round((time.perf_counter() - start) * 1e3, 4))
    return times[2:]


def show(results: Sequence[Result]) -> None:
    """Print a table with a line for each result, the baseline first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("runtime", no_wrap=True)
    for name in ("max |Δ|", "median ms", "p20", "p90", "min", "speed-up", "95 %", "by MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        by_macs, diff = result.speedup_by_macs, result.max_abs_diff
        speedup = (
            f"{result.speedup:.2f}×",
            f"{result.speedup_low:.2f}–{result.speedup_high:.2f}",
            f"{by_macs:.2f}×" if by_macs else "–",
        )
        table.add_row(
            result.path,
            f"{result.backend} {result.precision}",
            "–" if diff is None else f"{diff:.1e}",
            *(f"{value:.2f}" for value in result.summary().values()),
            *(("baseline",) if result is results[0] else speedup),
        )
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # numbers are never cut
    console.print(table)


def rows(results: Sequence[Result], threads: int | None) -> Iterator[dict[str, Any]]:
    """Yield a JSON object for each result: configuration, numbers, machine and versions."""
    here = diagnose()
    git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --dirty"
    failed, commit = subprocess.getstatusoutput(f"{git} --abbrev=40 --exclude='*'")
    for result in results:
        yield {
            "benchmark": "latency",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "threads": threads,
            "baseline": results[0].path,
            **result.summary(),
            **asdict(result),
            "waiting_stopped": CAN_STOP,
            "machine": here.machine,
            "versions": {"tomexport": tomexport.__version__, **here.packages},
            "commit": None if failed else commit,
        }


def main() -> int:
    """Time the files named on the command line."""
    if sys.argv[1:] == ["--worker"]:
        _work()
        return 0
    parser = argparse.ArgumentParser(description="Compare the latency of exported files fairly.")
    parser.add_argument("files", nargs="+", metavar="FILE", help=".onnx or .xml, baseline first")
    parser.add_argument("--backend", help="onnxruntime or openvino; by the suffix if left out")
    parser.add_argument("--precision", help="f32, bf16 or f16; the runtime's default if left out")
    parser.add_argument("--threads", type=int, help="CPU threads; left to the runtime if left out")
    parser.add_argument("--batch", type=int, help="images per call, for files of dynamic batch")
    parser.add_argument("--rounds", type=int, default=20, help="at least this many (default 20)")
    parser.add_argument("--seconds", type=float, default=20, help="at least this long (default 20)")
    parser.add_argument("--jsonl", type=Path, metavar="OUT", help="append a line for each file")
    args = parser.parse_args()
    if args.rounds < 1 or (args.batch is not None and args.batch < 1):
        parser.error("--rounds and --batch must be 1 or more")
    if not CAN_STOP:
        print("this system cannot stop the processes that wait; expect noise", file=sys.stderr)
    variants = [Variant(file, args.backend, args.precision, args.batch) for file in args.files]
    print(f"timing in turns for {args.seconds:g} s or longer …", file=sys.stderr)
    try:
        results = compare(variants, args.rounds, args.seconds, args.threads)
        show(results)
        if args.jsonl:
            lines = [json.dumps(row) + "\n" for row in rows(results, args.threads)]
            with args.jsonl.open("a", encoding="utf-8") as out:
                out.writelines(lines)
    except (TomexportError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
