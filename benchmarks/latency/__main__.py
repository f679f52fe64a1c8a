"""Measure what merging costs and saves, and write the tables of the README and of RESULTS.md.

    python -m benchmarks.latency                      everything; 45 to 60 minutes on two cores,
                                                      after 15 minutes and 22 GB of exports
    python -m benchmarks.latency --resume             what the results file does not hold yet
    python -m benchmarks.latency --quick              a trial: DeiT-Tiny, const:8, few rounds
    python -m benchmarks.latency --tables             only write the tables from the results

Models, schedules and runtimes can be named; see --help. A trial prints its tables: only the
results file that the tables cite is written into the pages.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.latency import cases, tables
from benchmarks.latency.cases import (
    BATCHES,
    GPU,
    MODELS,
    REWRITES,
    RUNTIMES,
    SCHEDULES,
    Group,
    Model,
)
from benchmarks.latency.results import Results
from tomexport.errors import TomexportError
from tomexport.plan import Schedule
from tomexport.runtime.machine import usable_cpus
from tomexport.runtime.timing import MIN_ROUNDS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _options(arguments)
    if not options.tables:
        _measure(options)
    results = Results.load(options.out)
    if options.out.resolve() == tables.SOURCE:
        tables.write(results)
    else:
        print(tables.page(results, options.out.name))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    runtimes = [runtime.name for runtime in RUNTIMES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--models", nargs="+", default=[model.name for model in MODELS], help="timm names")
    add("--batches", nargs="+", type=int, default=BATCHES, help="images per call")
    add("--schedules", nargs="+", default=SCHEDULES, help="tokens to remove")
    add("--runtimes", nargs="+", choices=runtimes, default=runtimes)
    add(
        "--rewrites",
        nargs="*",
        choices=REWRITES,
        default=REWRITES,
        help="graph rewrites to turn off, on the first model at batch 1; none to leave them out",
    )
    add("--threads", type=int, default=2, help="CPU threads, each with a CPU to itself")
    add("--rounds", type=int, help="least rounds of a group, instead of those planned for it")
    add("--launches", type=int, help="launches of a group's processes, instead of those planned")
    add("--seconds", type=float, help="least seconds of a group's turns")
    add("--work", type=Path, default=Path("build/latency"), help="folder of the exported files")
    add("--out", type=Path, help=f"results file; default {tables.SOURCE.name}")
    add("--resume", action="store_true", help="add to the results file what it lacks")
    add("--quick", action="store_true", help="a small trial, into WORK/quick.json")
    add("--tables", action="store_true", help="measure nothing; write the tables")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(
            models=[MODELS[0].name], batches=[1], schedules=["const:8"], rounds=MIN_ROUNDS,
            launches=1,
        )  # fmt: skip
        options = parser.parse_args(arguments)
    default = options.work / "quick.json" if options.quick else tables.SOURCE
    options.out = options.out or default
    problem = _problem(options)
    if problem:
        parser.error(problem)
    return options


def _problem(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, in words."""
    exists = options.out.exists()
    if options.tables:
        return None if exists else f"there is no {options.out} to make tables of"
    if options.rounds is not None and options.rounds < MIN_ROUNDS:
        return f"{options.rounds} rounds hold no 95 % interval; use {MIN_ROUNDS} or more"
    if options.launches is not None and options.launches < 1:
        return f"{options.launches} launches; use 1 or more"
    if not 1 <= options.threads <= len(usable_cpus()):
        return f"{options.threads} threads; this process may use {len(usable_cpus())} CPUs"
    if exists and not options.resume and not options.quick:
        return f"{options.out} exists; --resume adds what it lacks, or name another with --out"
    try:
        for schedule in options.schedules:
            Schedule.parse(schedule)
    except TomexportError as err:
        return str(err)
    return None


def _measure(options: argparse.Namespace) -> None:
    from benchmarks.latency import files
    from benchmarks.latency.measure import measure

    results = Results.new(files.sources("*.py", "*.h", "*.cpp"))
    if options.resume and options.out.exists():
        before = Results.load(options.out)
        if (before.machine, before.versions) != (results.machine, results.versions):
            sys.exit(
                f"{options.out} is of another machine, or of other versions or sources; name "
                "another file with --out, or remove it to measure all anew"
            )
        results = before
    if files.fresh(options.work):
        _say(f"the files in {options.work} were of other sources: they are exported anew")
    wanted = list(
        cases.groups(
            [_model(name) for name in options.models], options.batches, options.schedules,
            [runtime for runtime in RUNTIMES if runtime.name in options.runtimes],
            options.rewrites, options.rounds, options.launches,
        )
    )  # fmt: skip
    done = results.measured()
    todo = [group for group in wanted if group.key not in done]
    if len(todo) < len(wanted):
        _say(f"{len(wanted) - len(todo)} of {len(wanted)} groups are measured already")
    for group in todo:
        if group.runtime is not GPU:  # whose files are the same, and may not be wanted
            files.write(options.work, group, _say)
    clock = _Clock()
    for index, group in enumerate(todo):
        _say(f"[{index + 1}/{len(todo)}] {clock.left(todo[index:])}: {group.title}")
        start = time.monotonic()
        record = measure(group, options.work, options.threads, options.seconds, _progress)
        results.groups.append(record)
        results.save(options.out)
        clock.took(group, time.monotonic() - start)


def _model(name: str) -> Model:
    return next((model for model in MODELS if model.name == name), Model(name))


class _Clock:
    """Says how long it will take, from how long it has taken against the estimates."""

    def __init__(self) -> None:
        self.estimated = self.taken = 0.0

    def took(self, group: Group, seconds: float) -> None:
        self.estimated += group.estimate_s
        self.taken += seconds

    def left(self, groups: Sequence[Group]) -> str:
        pace = self.taken / self.estimated if self.estimated else 1.0
        return f"about {pace * sum(g.estimate_s for g in groups) / 60:.0f} min left"


def _say(line: str) -> None:
    _progress("")
    print(line, flush=True)


def _progress(message: str) -> None:
    """Show what is being done, on a terminal only, in a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
