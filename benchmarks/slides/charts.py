"""The slides' two curves: alpha swept, and FLOPs against images/s."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.latency.results import Results
from benchmarks.pages import Measured, measured
from benchmarks.slides.cases import ALPHAS, SHARES, SRET, swept, variant
from tomexport.errors import need

ALPHA, PARETO = "slides-alpha.png", "slides-pareto.png"
PARETO_BATCHES = (1, 32)
_SHADES = dict(zip(SHARES, ("#9ecae1", "#4292c6", "#08519c"), strict=True))
_KINDS = {"none": "#555555", "const": "#1f6f8b", "linear": "#d08c2f", "exp": "#a23b50"}


def drawable(results: Results) -> dict[str, Callable[[Results, Any], None]]:
    """Return the pictures that these results hold enough for, and what draws each."""
    found: dict[str, Callable[[Results, Any], None]] = {}
    if measured(results, "sweep"):
        found[ALPHA] = _alpha
    if measured(results, "schedules", model=SRET):
        found[PARETO] = _pareto
    return found


def write(results: Results, folder: Path) -> None:
    """Draw what can be drawn into a folder; each picture appears whole."""
    folder.mkdir(exist_ok=True)
    for name, draw in drawable(results).items():
        figure = need("matplotlib.figure", "chart").Figure(layout="constrained")
        draw(results, figure)
        staged = folder / f"staged-{name}"
        figure.savefig(staged, dpi=110)
        os.replace(staged, folder / name)


def _rate(group: Measured, schedule: str) -> float:
    """Return images/s; not a number where it could not run."""
    rate = group.images_per_s(variant(schedule))
    return math.nan if rate is None else rate


def _gflops(group: Measured, schedule: str) -> float:
    return float(group.record["costs"][schedule]["flops_slides"]) / 1e9


def _alpha(results: Results, figure: Any) -> None:
    groups = measured(results, "sweep")
    figure.set_size_inches(3.6 * (len(groups) + 1), 3.4)
    first, *others = figure.subplots(1, len(groups) + 1, sharex=True)
    _sweep(first, "GFLOPs", lambda schedule: _gflops(groups[0], schedule))
    for panel, group in zip(others, groups, strict=True):
        _sweep(panel, "images/s", lambda schedule, group=group: _rate(group, schedule))
        panel.set_title(f"{group.runtime}, batch {group.record['batch']}", fontsize=9)
    first.set_title("slides' convention", fontsize=9)
    first.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{SRET}: exp:r_init,alpha", fontsize=10)


def _sweep(panel: Any, unit: str, value: Callable[[str], float]) -> None:
    for share in SHARES:
        heights = [value(swept(share, alpha)) for alpha in ALPHAS]
        panel.plot(ALPHAS, heights, "o-", color=_SHADES[share], label=f"r_init {share:.2f}", ms=4)
    panel.axhline(value("none"), color=_KINDS["none"], linestyle=":", label="none")
    panel.set_xlabel("alpha")
    panel.set_ylabel(unit)
    panel.spines[["top", "right"]].set_visible(False)


def _pareto(results: Results, figure: Any) -> None:
    rows = [measured(results, "schedules", model=SRET, batch=batch) for batch in PARETO_BATCHES]
    rows = [row for row in rows if row]
    width = max(map(len, rows))
    figure.set_size_inches(4 * width, 3.4 * len(rows))
    panels = figure.subplots(len(rows), width, squeeze=False)
    for row, groups in zip(panels, rows, strict=True):
        for panel, group in zip(row, groups, strict=False):
            _points(panel, group)
        for panel in row[len(groups) :]:
            panel.set_axis_off()
    figure.suptitle(
        f"{SRET}: what a schedule computes, and how fast it is (line: as the FLOPs promise)",
        fontsize=10,
    )


def _points(panel: Any, group: Measured) -> None:
    for schedule in ("none", *group.record["schedules"]):
        place = _gflops(group, schedule), _rate(group, schedule)
        colour = _KINDS.get(schedule.partition(":")[0], _KINDS["none"])
        panel.plot(*place, "o", color=colour, ms=5)
        left = schedule.startswith("linear")  # whose points lie beside those of other kinds
        panel.annotate(
            schedule, place, xytext=(-5, -4) if left else (5, 2), textcoords="offset points",
            ha="right" if left else "left", va="top" if left else "bottom", fontsize=7,
            color=colour,
        )  # fmt: skip
    flops = sorted(_gflops(group, name) for name in ("none", *group.record["schedules"]))
    work = _gflops(group, "none") * _rate(group, "none")
    panel.plot(flops, [work / each for each in flops], ":", color=_KINDS["none"], linewidth=1)
    panel.margins(x=0.22, y=0.1)
    panel.set_xlabel("GFLOPs (slides' convention)")
    panel.set_ylabel("images/s")
    panel.set_title(f"{group.runtime}, batch {group.record['batch']}", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
