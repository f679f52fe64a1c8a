"""Results → Markdown: RESULTS.md with every row, and the README's short tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.latency.cases import (
    BOUND,
    FUSED,
    METHODS,
    METHODS_MODEL,
    MODELS,
    NAIVE,
    NONE,
    PORTABLE,
    REWRITE_SCHEDULE,
    REWRITES,
    SCHEDULES,
    SLICE,
    TIMM,
)
from benchmarks.latency.results import Results
from benchmarks.pages import README, ROOT, Measured, between, machine, measured, table, wrapped
from tomexport import plan

SOURCE = ROOT / "benchmarks/results/latency.json"
RESULTS = ROOT / "benchmarks/RESULTS.md"
_GIGA = 1e9
_TWINS = {
    PORTABLE: "standard operators against fused",
    NAIVE: "naive scatter against ours",
    TIMM: "timm's export against none",
}
MARKS = "<!-- latency:begin -->", "<!-- latency:end -->"
Record = dict[str, Any]
Rows = Iterator[Sequence[str]]


def write(results: Results) -> None:
    """Write RESULTS.md and what stands between the README's marks."""
    RESULTS.write_text(page(results, SOURCE.name), encoding="utf-8")
    README.write_text(with_tables(README.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_tables(readme: str, results: Results) -> str:
    """Return the README with the tables of these results between its marks."""
    return between(readme, MARKS, short(results))


# ---- tables


Cell = Callable[[Measured, str], str]
# what is said of a schedule: speed-ups over none, overheads over the bound
_COLUMNS: dict[str, Cell] = {
    "rounds": lambda group, schedule: group.rounds,
    "none, ms": lambda group, schedule: group.median((NONE, "none")),
    "timm's export": lambda group, schedule: group.speedup((TIMM, "none")),
    "fused": lambda group, schedule: group.speedup((FUSED, schedule)),
    "standard operators": lambda group, schedule: group.speedup((PORTABLE, schedule)),
    "naive scatter": lambda group, schedule: group.speedup((NAIVE, schedule)),
    "if merging were free": lambda group, schedule: group.speedup((BOUND, schedule)),
    "overhead, fused": lambda group, schedule: group.overhead((FUSED, schedule), (BOUND, schedule)),
    "overhead, standard": lambda group, schedule: group.overhead(
        (PORTABLE, schedule), (BOUND, schedule)
    ),
}
_ALL = tuple(_COLUMNS)
_SHORT = ("rounds", "fused", "standard operators", "naive scatter", "if merging were free",
          "overhead, fused")  # fmt: skip


def _by_schedule(groups: Sequence[Measured], columns: Sequence[str] = _ALL) -> str:
    """Return a table of one model and batch, all schedules in all runtimes."""
    rows = (
        [f"`{schedule}`", group.runtime, *(_COLUMNS[name](group, schedule) for name in columns)]
        for schedule in _in_order(groups)
        for group in groups
        if schedule in group.record["schedules"]
    )
    return table(("schedule", "runtime", *columns), rows)


def _by_model(groups: Sequence[Measured], schedule: str, columns: Sequence[str]) -> str:
    """Return a table of one schedule, all models and batches in all runtimes."""
    rows = (
        [f"`{group.record['model']}`", f"{group.record['batch']}", group.runtime,
         *(_COLUMNS[name](group, schedule) for name in columns)]
        for group in groups
        if schedule in group.record["schedules"]
    )  # fmt: skip
    return table(("model", "batch", "runtime", *columns), rows)


def _in_order(groups: Sequence[Measured]) -> list[str]:
    found = dict.fromkeys(s for group in groups for s in group.record["schedules"])
    return sorted(found, key=lambda s: (SCHEDULES.index(s) if s in SCHEDULES else 99, s))


def _methods(groups: Sequence[Measured]) -> str:
    """Return a row for each method and runtime, with what it costs beyond its own bound."""
    plans = {name: plan(METHODS_MODEL, schedule, method=name) for name, schedule in METHODS.items()}
    rows = (
        [f"`{name}`", f"`{METHODS[name]}`", f"{plans[name].macs / _GIGA:.2f}", group.runtime,
         group.rounds, group.speedup(own), group.speedup(bound), group.overhead(own, bound)]
        for name in METHODS
        for group in groups
        if (own := (name, METHODS[name])) in group
        and (bound := (f"{BOUND}:{name}", METHODS[name])) in group
    )  # fmt: skip
    head = ("method", "schedule", "GMACs", "runtime", "rounds", "speed-up", "if it were free",
            "overhead")  # fmt: skip
    return table(head, rows)


def _rewrites(groups: Sequence[Measured]) -> str:
    """Return a row for each rewrite: how much longer the graph takes without it."""
    rows: list[list[str]] = []

    def row(words: str, own: tuple[str, str], other: tuple[str, str]) -> None:
        timed = {group: own in group and other in group for group in groups}
        if any(timed.values()):
            cells = [g.overhead(own, other) if there else "–" for g, there in timed.items()]
            first = next(group for group, there in timed.items() if there)
            rows.append([words, *cells, first.difference(own)])

    for name, words in REWRITES.items():
        twin = "all" if name == "LayerScale" else NONE
        row(words, (f"without {name}", "none"), (twin, "none"))
    row("all of them: timm's own export", (TIMM, "none"), (NONE, "none"))
    schedule = REWRITE_SCHEDULE
    row(f"timm's module sliced as `{schedule}`, against the bound",
        (SLICE, schedule), (BOUND, schedule))  # fmt: skip
    head = [
        "rewrite",
        *(f"time without it, {group.runtime}, {group.rounds}" for group in groups),
        "max |Δ|",
    ]
    return table(head, iter(rows))


# ---- pages

_METHOD = """\
Each variant runs in a process of its own on {threads} CPUs of {cpu}; those that wait are stopped,
and all that a row compares take turns in every round. A figure is the median over the rounds of
the ratio within a round, with its 95 % interval from a bootstrap. *Rounds* are launches of the
processes × rounds of each: two processes of one file can differ by some percent for as long as
they live, which the interval of a single launch does not hold. Figures with × are speed-ups over
`none`, tomexport's unmerged export of the same model;
*overhead* is the time beyond the free-merge bound, the merged graph with every merge replaced by
one Slice. *timm's export* is `torch.onnx.export` of timm's own model, unmerged. *Naive scatter* is
ToMe written in the usual way (argsort, gather, scatter_add in patched timm blocks) and exported
alike. Weights are seeded, not trained.
"""


def _method(results: Results) -> str:
    groups = measured(results, "schedules", device="CPU") + measured(results, "rewrites")
    threads = "/".join(sorted({f"{group.record['threads']}" for group in groups}))
    return wrapped(_METHOD.format(threads=threads, cpu=results.machine["cpu"]))


def short(results: Results) -> str:
    """Return the README's part: one model with all schedules, one schedule with all models."""
    model = MODELS[0].name
    link = f"[benchmarks/results/{SOURCE.name}](benchmarks/results/{SOURCE.name})"
    groups = measured(results, "schedules", device="CPU")
    first = [g for g in groups if (g.record["model"], g.record["batch"]) == (model, 1)]
    parts = [
        _method(results),
        f"`{model}`, batch 1 (samples: {link}):\n",
        _by_schedule(first, _SHORT),
        f"`const:8` on every model (samples: {link}):\n",
        _by_model(groups, "const:8", ("none, ms", "timm's export", *_SHORT)),
    ]
    return "\n".join(("", *parts)) + "\n"


def page(results: Results, source: str) -> str:
    """Return RESULTS.md.

    Args:
        results: what has been measured.
        source: name of the file that holds it, in benchmarks/results.
    """
    cited = f"Samples: [results/{source}](results/{source})\n"
    parts = [
        "# What merging costs and saves\n",
        "Written by `python -m benchmarks.latency`; do not edit.\n",
        _method(results),
        *_worst(results),
    ]
    for record in _first_of_each(results, "schedules", "CPU"):
        where = {"model": record["model"], "batch": record["batch"]}
        groups = measured(results, "schedules", device="CPU", **where)
        heading = f"## `{record['model']}`, batch {record['batch']}\n"
        parts += [heading, _by_schedule(groups), cited]
    if groups := measured(results, "methods"):
        parts += [f"## Methods at equal MACs: `{METHODS_MODEL}`, batch 1\n"]
        parts += [_METHODS_TEXT, _methods(groups), cited]
    if groups := measured(results, "rewrites"):
        model = groups[0].record["model"]
        parts += [f"## Exact rewrites of the graph: `{model}`, batch 1, unmerged\n"]
        parts += [_REWRITES_TEXT, _rewrites(groups), cited]
    parts += ["## GPU\n", *_gpu(results, cited), "## Machine and versions\n", machine(results)]
    return "\n".join(parts)


_METHODS_TEXT = """\
Every method with its own schedule where it is published. The overhead is over the method's own
bound, in which a Slice stands in the place of every choice and reduction.
"""
_REWRITES_TEXT = """\
How much longer the unmerged export takes with this one rewrite turned off, the others being on;
and the largest difference that it makes to the output, relative where outputs exceed 1.
"""


def _first_of_each(results: Results, part: str, device: str) -> list[Record]:
    """Return one record for each model and batch."""
    found: dict[tuple[str, int], Record] = {}
    for group in measured(results, part, device=device):
        found.setdefault((group.record["model"], group.record["batch"]), group.record)
    return list(found.values())


def _worst(results: Results) -> list[str]:
    """Say how far the outputs of the variants are apart in ONNX Runtime, and what did not run."""
    lines = []
    groups = measured(results, "schedules", runtime="onnxruntime")
    for form, words in _TWINS.items():
        found = [
            (variant["difference"], group.record)
            for group in groups
            for variant in group.record["variants"]
            if variant["form"] == form and variant.get("difference") is not None
        ]
        if found:
            worst, record = max(found, key=lambda each: each[0])
            where = f"`{record['model']}`, batch {record['batch']}"
            lines.append(f"- {words}: at most {worst:.1e} ({where})")
    if lines:
        lines.insert(
            0, "Largest difference of outputs in ONNX Runtime, relative where they exceed 1:\n"
        )
    refused = {
        (group.runtime, variant["form"], variant["refused"])
        for part in ("schedules", "methods", "rewrites")
        for group in measured(results, part)
        for variant in group.record["variants"]
        if "refused" in variant
    }
    lines += [f"- {runtime}: {form} does not run: {why}" for runtime, form, why in sorted(refused)]
    left_out = {(r["runtime"], r["left_out"]) for r in results.groups if "left_out" in r}
    lines += [f"- {runtime} is left out: {why}" for runtime, why in sorted(left_out)]
    return ["\n".join(lines) + "\n"] if lines else []


def _gpu(results: Results, cited: str) -> Iterator[str]:
    found = _first_of_each(results, "schedules", "CUDA")
    for record in found:
        where = {"model": record["model"], "batch": record["batch"]}
        yield f"`{record['model']}`, batch {record['batch']}:\n"
        yield _by_schedule(measured(results, "schedules", device="CUDA", **where))
        yield cited
    if not found:
        asked = any(record["runtime"] == "gpu" for record in results.groups)
        yield "no GPU here\n" if asked else "not measured\n"
