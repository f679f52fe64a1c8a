"""Results → Markdown and pictures: SLIDES.md with every row, and the README's short tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.latency.cases import BOUND, FUSED
from benchmarks.latency.results import Results
from benchmarks.pages import README, ROOT, Measured, between, machine, measured, table, wrapped
from benchmarks.slides import charts
from benchmarks.slides.cases import (
    BASELINE,
    BOUNDED,
    MODELS,
    PUBLISHED,
    SRET,
    variant,
)

SOURCE = ROOT / "benchmarks/results/slides.json"
PAGE = SOURCE.with_name("SLIDES.md")
PICTURES = ROOT / "docs"
MARKS = "<!-- slides:begin -->", "<!-- slides:end -->"
SHORT_BATCHES = (1, 32)  # of the README
_GIGA = 1e9


def write(results: Results) -> None:
    """Write SLIDES.md, the pictures, and what stands between the README's marks."""
    charts.write(results, PICTURES)
    PAGE.write_text(page(results, SOURCE.name), encoding="utf-8")
    README.write_text(with_tables(README.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_tables(readme: str, results: Results) -> str:
    """Return the README with the tables of these results between its marks."""
    return between(readme, MARKS, short(results))


# ---- cells


def _speed(group: Measured, schedule: str) -> str:
    value = group.images_per_s(variant(schedule))
    return "–" if value is None else f"{value:.1f}"


def _ratio(group: Measured, schedule: str) -> str:
    return "1" if schedule == "none" else group.speedup(variant(schedule))


def _memory(group: Measured, schedule: str, what: str) -> str:
    value = group.get(variant(schedule), what)
    return "–" if value is None else f"{value:g}"


def _memory_ratio(group: Measured, schedule: str, what: str) -> str:
    own, base = group.get(variant(schedule), what), group.get(variant("none"), what)
    return f"{own / base:.2f}" if own is not None and base else "–"


def _published(schedule: str, model: str) -> tuple[str, str, str, str, str]:
    """Return the slides' top-1, GFLOPs, and ratios of FLOPs, memory and images/s."""
    said = {"none": BASELINE, **PUBLISHED}.get(schedule) if model == SRET else None
    if said is None:
        return ("–",) * 5
    speed = "1" if schedule == "none" else f"{said.speedup:.3f}" if said.speedup else "–"
    return (
        f"{said.top1:.2f}", f"{said.gflops:.2f}", f"{said.gflops / BASELINE.gflops:.2f}",
        f"{said.mib / BASELINE.mib:.2f}", speed,
    )  # fmt: skip


def _schedules(groups: Sequence[Measured]) -> list[str]:
    return ["none", *dict.fromkeys(s for group in groups for s in group.record["schedules"])]


def _costs(groups: Sequence[Measured]) -> dict[str, dict[str, int]]:
    return {name: cost for group in groups for name, cost in group.record["costs"].items()}


# ---- tables


def costs(groups: Sequence[Measured]) -> str:
    """Return a table of one model: what each schedule computes, beside what the slides say."""
    all_costs, model = _costs(groups), groups[0].record["model"]
    base = all_costs["none"]

    def row(schedule: str) -> list[str]:
        cost = all_costs[schedule]
        cells = [f"`{schedule}`", f"{cost['removed']}"]
        for name in ("flops_slides", "macs"):
            cells += [f"{cost[name] / _GIGA:.3f}", f"{cost[name] / base[name]:.2f}"]
        return [*cells, *_published(schedule, model)]

    head = ("schedule", "removed", "GFLOPs", "ratio", "GMACs", "ratio", "slides: top-1, %",
            "GFLOPs", "ratio", "GPU memory, ratio", "GPU images/s, ratio")  # fmt: skip
    return table(head, [row(schedule) for schedule in _schedules(groups)])


def timed(groups: Sequence[Measured]) -> str:
    """Return a table of one model and batch: every schedule in every runtime."""

    def row(group: Measured, schedule: str) -> list[str]:
        *_, slides_memory, slides_speed = _published(schedule, group.record["model"])
        memory = [
            cell(group, schedule, what)
            for what in ("peak_mib", "call_mib")
            for cell in (_memory, _memory_ratio)
        ]
        return [
            f"`{schedule}`", group.runtime, group.rounds, _speed(group, schedule),
            _ratio(group, schedule), slides_speed, *memory, slides_memory,
        ]  # fmt: skip

    head = ("schedule", "runtime", "rounds", "images/s", "ratio", "slides' GPU", "peak, MiB",
            "ratio", "in calls, MiB", "ratio", "slides' GPU")  # fmt: skip
    return table(
        head,
        [
            row(group, schedule)
            for schedule in _schedules(groups)
            for group in groups
            if schedule in ("none", *group.record["schedules"])
        ],
    )


def compact(groups: Sequence[Measured]) -> str:
    """Return a table of one model and batch: a row a schedule; memory in float32 only."""
    in_f32 = [group for group in groups if not group.record["runtime"].endswith("-default")]

    def row(schedule: str) -> list[str]:
        *_, slides_memory, slides_speed = _published(schedule, groups[0].record["model"])
        if schedule == "none":
            speeds = [f"{_speed(group, schedule)} images/s" for group in groups]
            memory = [f"{_memory(group, schedule, 'call_mib')} MiB" for group in in_f32]
        else:
            speeds = [_ratio(group, schedule) for group in groups]
            memory = [_memory_ratio(group, schedule, "call_mib") for group in in_f32]
        return [f"`{schedule}`", *speeds, slides_speed, *memory, slides_memory]

    runtimes = [group.runtime for group in groups]
    head = ["schedule", *runtimes, "slides' GPU"]
    head += [*(f"memory, {group.runtime}" for group in in_f32), "memory, slides' GPU"]
    return table(head, [row(schedule) for schedule in _schedules(groups)])


def overheads(groups: Sequence[Measured]) -> str:
    """Return how much longer merging takes than if it were free."""
    rows = [
        [f"`{schedule}`", group.runtime, group.rounds, _ratio(group, schedule),
         group.speedup((BOUND, schedule)),
         group.overhead((FUSED, schedule), (BOUND, schedule))]
        for schedule in BOUNDED
        for group in groups
        if (BOUND, schedule) in group
    ]  # fmt: skip
    return table(("schedule", "runtime", "rounds", "merged", "if free", "overhead"), rows)


def carried(results: Results, schedules: Sequence[str], batches: Sequence[int]) -> str:
    """Return what a few schedules give on every model, a column for each runtime."""
    rows, runtimes = [], dict.fromkeys(g.runtime for g in measured(results, "schedules"))
    for model, batch in _models_and_batches(results):
        groups = measured(results, "schedules", model=model, batch=batch)
        flops = {name: cost["flops_slides"] for name, cost in _costs(groups).items()}
        for schedule in [each for each in schedules if each in flops and batch in batches]:
            ratios = {g.runtime: _ratio(g, schedule) for g in groups if variant(schedule) in g}
            cells = [f"`{model}`", f"{batch}", f"`{schedule}`"]
            cells.append(f"{flops[schedule] / flops['none']:.2f}")
            rows.append([*cells, *(ratios.get(runtime, "–") for runtime in runtimes)])
    return table(("model", "batch", "schedule", "FLOPs, ratio", *runtimes), rows)


# ---- pages

_METHOD = """\
Each variant runs in a process of its own, with fused kernels, on {threads} CPUs of {cpu}; those
that wait are stopped, and all schedules of a model take turns in every round. Images/s are of the
median call; a *ratio* is to the unmerged export (`none`) of the same model, runtime and batch: for
images/s the median over the rounds of the ratio within a round, with its 95 % interval from a
bootstrap of launches and rounds. *FLOPs* are by the slides' convention (no attention products),
*MACs* hold attention. *Peak* is the most memory that the process held, *in calls* the most that its
calls held beyond what was loaded, which is nearest to what the slides' GPU column counts. Weights
are seeded, not trained, so accuracies are the slides' own.
"""
_OVERHEAD = "What merging itself costs: `{model}`, batch 1, against the free-merge bound:\n"
_CARRIED = """\
Does it carry? `deit_tiny_distilled_patch16_224` is a plain ViT; `deit_tiny_distilled_4x3` is the
same with 4 blocks called 3 times each, their weights stored once:
"""
_ALPHA = "Images/s and FLOPs against the decay of the exponential schedule"
_PARETO = "FLOPs against images/s of every schedule"


def _method(results: Results) -> str:
    threads = "/".join(
        sorted({f"{r['threads']}" for r in results.groups if "left_out" not in r}) or ["–"]
    )
    return wrapped(_METHOD.format(threads=threads, cpu=results.machine["cpu"]))


def _models_and_batches(results: Results) -> list[tuple[str, int]]:
    """Return every model with each of its batches, in the order of `cases`."""
    found = {(g.record["model"], g.record["batch"]) for g in measured(results, "schedules")}
    names = [model.name for model in MODELS]
    return sorted(found, key=lambda pair: (*(name != pair[0] for name in names), pair))


def _bounded(results: Results) -> list[Measured]:
    return measured(results, "schedules", model=SRET, batch=1)


def _pictures(results: Results, folder: str) -> list[str]:
    drawn = charts.drawable(results)
    words = {charts.ALPHA: _ALPHA, charts.PARETO: _PARETO}
    return [f"![{words[name]}]({folder}/{name})\n" for name in words if name in drawn]


def short(results: Results) -> str:
    """Return the README's part: SReT-T at two batches, the cost of merging, the other models."""
    every = f"[benchmarks/results/{PAGE.name}](benchmarks/results/{PAGE.name})"
    raw = f"[benchmarks/results/{SOURCE.name}](benchmarks/results/{SOURCE.name})"
    groups = measured(results, "schedules", model=SRET)
    parts = [_method(results), f"Every row: {every}; samples: {raw}.\n"]
    if groups:
        parts += [f"`{SRET}`, what the schedules compute:\n", costs(groups)]
    for batch in SHORT_BATCHES:
        if at := measured(results, "schedules", model=SRET, batch=batch):
            told = f"`{SRET}`, batch {batch}: images/s, and memory that calls take, as ratios:\n"
            parts += [told, compact(at)]
    if bounded := _bounded(results):
        parts += [_OVERHEAD.format(model=SRET), overheads(bounded)]
    parts += [wrapped(_CARRIED), carried(results, BOUNDED, SHORT_BATCHES)]
    return "\n".join(("", *parts, *_pictures(results, PICTURES.name))) + "\n"


def page(results: Results, source: str) -> str:
    """Return SLIDES.md.

    Args:
        results: what has been measured.
        source: name of the file that holds it, in benchmarks/results.
    """
    parts: list[Any] = [
        "# The slides' schedules on a CPU\n",
        "Written by `python -m benchmarks.slides`; do not edit.\n",
        _method(results),
        f"Samples: [{source}]({source})\n",
    ]
    before = None
    for model, batch in _models_and_batches(results):
        groups = measured(results, "schedules", model=model, batch=batch)
        if model != before:
            parts += [f"## `{model}`\n", costs(groups)]
        parts += [f"Batch {batch}:\n", timed(groups)]
        before = model
    if bounded := _bounded(results):
        parts += ["## Overhead\n", _OVERHEAD.format(model=SRET), overheads(bounded)]
    if swept := measured(results, "sweep"):
        parts += ["## Alpha\n", costs(swept), timed(swept)]
    parts += _pictures(results, f"../../{PICTURES.name}")
    left_out = {(r["runtime"], r["left_out"]) for r in results.groups if "left_out" in r}
    refused = {
        (group.runtime, each["refused"])
        for part in ("schedules", "sweep")
        for group in measured(results, part)
        for each in group.record["variants"]
        if "refused" in each
    }
    parts += [f"- {runtime}: {why}\n" for runtime, why in sorted(left_out | refused)]
    return "\n".join((*parts, "## Machine and versions\n", machine(results)))
