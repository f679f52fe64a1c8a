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
from collections.abc import Sequence

from benchmarks import command
from benchmarks.latency import cases, tables
from benchmarks.latency.cases import BATCHES, METHODS, MODELS, REWRITES, RUNTIMES, SCHEDULES
from benchmarks.latency.results import Results
from tomexport.runtime.timing import MIN_ROUNDS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _options(arguments)
    if not options.tables:
        command.measure(options, _groups(options))
    results = Results.load(options.out)
    if options.out.resolve() == tables.SOURCE:
        tables.write(results)
    else:
        print(tables.page(results, options.out.name))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    runtimes = [runtime.name for runtime in RUNTIMES]
    parser = command.parser("latency", __doc__, tables.SOURCE)
    add = parser.add_argument
    add(
        "--models",
        nargs="*",
        default=[model.name for model in MODELS],
        help="timm names; none to leave the schedules out",
    )
    add("--batches", nargs="+", type=int, default=BATCHES, help="images per call")
    add("--schedules", nargs="+", default=SCHEDULES, help="tokens to remove")
    add("--runtimes", nargs="+", choices=runtimes, default=runtimes)
    add(
        "--methods",
        nargs="*",
        choices=METHODS,
        default=METHODS,
        help=f"methods to compare on {cases.METHODS_MODEL} at batch 1; none to leave them out",
    )
    add(
        "--rewrites",
        nargs="*",
        choices=REWRITES,
        default=REWRITES,
        help="graph rewrites to turn off, on the first model at batch 1; none to leave them out",
    )
    return command.parse(
        parser, arguments, tables.SOURCE,
        models=[MODELS[0].name], batches=[1], schedules=["const:8"], rounds=MIN_ROUNDS, launches=1,
    )  # fmt: skip


def _groups(options: argparse.Namespace) -> list[cases.Group]:
    return list(
        cases.groups(
            [cases.model(name) for name in options.models], options.batches, options.schedules,
            [runtime for runtime in RUNTIMES if runtime.name in options.runtimes],
            list(options.methods), options.rewrites, options.rounds, options.launches,
        )
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
