"""Measure the slides' tables and curves on a CPU, and write them into SLIDES.md and the README.

    python -m benchmarks.slides                       everything; about 30 minutes on two cores,
                                                      after 15 minutes and 2 GB of exports
    python -m benchmarks.slides --resume              what the results file does not hold yet
    python -m benchmarks.slides --quick               a trial: SReT-T, exp:0.25,0, few rounds
    python -m benchmarks.slides --tables              only write the pages from the results

SReT-T at batch 1 runs 3 launches × 30 rounds, the other models 2 × 30; batch 8 has 2 × 9, batch 32
2 × 6, the sweep of alpha 2 × 20. Models, batches, schedules, runtimes and parts can be named, so
that it can be run step by step with --resume. A trial prints its tables: only the results file
that the pages cite is written into them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tomexport
from benchmarks import command
from benchmarks.latency import files
from benchmarks.latency.cases import Group, Model
from benchmarks.latency.results import Results
from benchmarks.slides import cases, tables
from benchmarks.slides.cases import BATCHES, MODELS, PARTS, RUNTIMES, SCHEDULES
from tomexport.runtime.timing import MIN_ROUNDS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _options(arguments)
    if not options.tables:
        command.measure(options, _groups(options), costs)
    results = Results.load(options.out)
    if options.out.resolve() == tables.SOURCE:
        tables.write(results)
    else:
        print(tables.page(results, options.out.name))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    runtimes = [runtime.name for runtime in RUNTIMES]
    parser = command.parser("slides", __doc__, tables.SOURCE)
    add = parser.add_argument
    add("--models", nargs="+", default=[model.name for model in MODELS], help="names")
    add("--batches", nargs="+", type=int, default=BATCHES, help="images per call")
    add("--schedules", nargs="+", default=SCHEDULES, help="tokens to remove")
    add("--runtimes", nargs="+", choices=runtimes, default=runtimes)
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="the tables, the sweep of alpha")
    return command.parse(
        parser, arguments, tables.SOURCE,
        models=[MODELS[0].name], batches=[1], schedules=["exp:0.25,0"], parts=["schedules"],
        rounds=MIN_ROUNDS, launches=1,
    )  # fmt: skip


def _groups(options: argparse.Namespace) -> list[Group]:
    known = {model.name: model for model in MODELS}
    return list(
        cases.groups(
            [known.get(name, Model(name)) for name in options.models], options.batches,
            options.schedules, [each for each in RUNTIMES if each.name in options.runtimes],
            options.parts, options.rounds, options.launches,
        )
    )  # fmt: skip


def costs(group: Group) -> command.Record:
    """Return what each schedule of a group computes of one image, and removes."""
    model = files.module(group.model.name)
    plans = {name: tomexport.plan(model, name) for name in ("none", *group.schedules)}
    return {
        "costs": {
            name: {
                "macs": plan.macs,
                "flops_slides": plan.flops_slides,
                "removed": plan.removed_total,
            }
            for name, plan in plans.items()
        }
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
