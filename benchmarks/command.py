"""What the measuring commands share: options, the loop over groups, and the time that is left."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.latency.cases import GPU, Group
from benchmarks.latency.results import Results
from tomexport.errors import TomexportError
from tomexport.plan import Schedule
from tomexport.runtime.machine import usable_cpus
from tomexport.runtime.timing import MIN_ROUNDS

Record = dict[str, Any]


def parser(name: str, about: str | None, source: Path) -> argparse.ArgumentParser:
    """Return a parser with the options that all commands have.

    Args:
        name: of the package in benchmarks.
        about: what the command does, with examples.
        source: the results file that the pages cite.
    """
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = found.add_argument
    add("--threads", type=int, default=2, help="CPU threads, each with a CPU to itself")
    add("--rounds", type=int, help="least rounds of a group, instead of those planned for it")
    add("--launches", type=int, help="launches of a group's processes, instead of those planned")
    add("--seconds", type=float, help="least seconds of a group's turns")
    work = Path("build") / name
    add("--work", type=Path, default=work, help="folder of the exported files")
    add("--out", type=Path, help=f"results file; default {source.name}")
    add("--resume", action="store_true", help="add to the results file what it lacks")
    add("--quick", action="store_true", help="a small trial, into WORK/quick.json")
    add("--tables", action="store_true", help="measure nothing; write the tables")
    return found


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, source: Path, **quick: Any
) -> argparse.Namespace:
    """Parse and check the options; `quick` holds the defaults of --quick."""
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**quick)
        options = parser.parse_args(arguments)
    options.out = options.out or (options.work / "quick.json" if options.quick else source)
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


def measure(
    options: argparse.Namespace,
    wanted: Sequence[Group],
    more: Callable[[Group], Record] = lambda group: {},
) -> None:
    """Measure what the results file does not hold yet; it is written after every group.

    Args:
        options: as `parse` returns them.
        wanted: the groups.
        more: what else the record of a group says.
    """
    from benchmarks.latency import files
    from benchmarks.latency.measure import measure as measure_group

    results = _results(options, files.sources("*.py", "*.h", "*.cpp"))
    if files.fresh(options.work):
        _say(f"the files in {options.work} were of other sources: they are exported anew")
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
        record = measure_group(group, options.work, options.threads, options.seconds, progress)
        results.groups.append(record | more(group))
        results.save(options.out)
        clock.took(group, time.monotonic() - start)


def _results(options: argparse.Namespace, sources: str) -> Results:
    results = Results.new(sources)
    if not (options.resume and options.out.exists()):
        return results
    before = Results.load(options.out)
    if (before.machine, before.versions) != (results.machine, results.versions):
        sys.exit(
            f"{options.out} is of another machine, or of other versions or sources; name "
            "another file with --out, or remove it to measure all anew"
        )
    return before


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
    progress("")
    print(line, flush=True)


def progress(message: str) -> None:
    """Show what is being done, on a terminal only, in a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
