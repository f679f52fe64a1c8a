"""Pictures: the latencies of a profile, and the front of a search."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomexport.delivery import check_file, publish, staging
from tomexport.errors import need
from tomexport.runtime.baselines import BOUND, FUSED, NONE, PORTABLE
from tomexport.runtime.profile import ProfileReport, Run, Variant, percent, times

if TYPE_CHECKING:
    from tomexport.calib.search.search import SearchReport

_COLOURS = {FUSED: "#1f6f8b", PORTABLE: "#7fb3c8", NONE: "#8a8a8a", BOUND: "#d9d9d9"}


def check(path: Path, *, force: bool) -> None:
    """Refuse a chart that cannot be drawn, before anything is timed.

    Raises: MissingExtraError without matplotlib, ExportError if the file cannot be written.
    """
    need("matplotlib", "chart")
    check_file(path, ".png", "a chart", force)


def draw(report: ProfileReport, path: Path) -> None:
    """Write a chart, whole or not at all.

    Raises: ExportError if it cannot be written.
    """
    figure = need("matplotlib.figure", "chart").Figure(layout="constrained")
    n_bars = sum(len(run.variants) for run in report.runs)
    figure.set_size_inches(9, 1.2 + 0.4 * n_bars + 0.5 * len(report.runs))
    heights = [len(run.variants) for run in report.runs]
    panels = figure.subplots(len(report.runs), sharex=True, height_ratios=heights, squeeze=False)
    for panel, run in zip(panels[:, 0], report.runs, strict=True):
        _draw_run(panel, run)
    panels[0, 0].set_xlim(left=0)
    panels[-1, 0].set_xlabel("ms per call: median, and from the 20th to the 90th percentile")
    figure.suptitle(f"{Path(report.path).name}: {report.model}, {report.schedule}")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with staging(path) as folder:
        figure.savefig(folder / path.name, dpi=150)
        publish(folder, path, force=True)


_FAMILY_COLOURS = {
    "none": "#555555", "const": "#1f6f8b", "linear": "#5aa9c4", "exp": "#d1793b", "keep": "#8a6fb0",
    "list": "#3f8f4f",
}  # fmt: skip


def draw_front(report: SearchReport, path: Path) -> None:
    """Draw loss over latency of all points of a search, whole or not at all.

    Raises: ExportError if it cannot be written.
    """
    figure = need("matplotlib.figure", "chart").Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    places = [(report.latency_ms(point), 100 * point.loss) for point in report.points]
    for family, colour in _FAMILY_COLOURS.items():
        own = [i for i, p in enumerate(report.points) if p.schedule.split(":")[0] == family]
        if own:
            x, y = zip(*(places[i] for i in own), strict=True)
            panel.scatter(x, y, s=[40 if report.front[i] else 12 for i in own], color=colour,
                          label=family)  # fmt: skip
    front = [place for place, best in zip(places, report.front, strict=True) if best]
    if front:
        panel.step(*zip(*front, strict=True), where="post", color="#999999", lw=1, zorder=0)
    for i, (point, best) in enumerate(zip(report.points, report.front, strict=True)):
        if best or i == report.chosen:
            words = textwrap.shorten(point.schedule.replace(",", ", "), 30, placeholder="…")
            panel.annotate(
                words, places[i], xytext=(6, 6), textcoords="offset points", fontsize=7,
                weight="bold" if i == report.chosen else "normal", rotation=20,
            )  # fmt: skip
    panel.set_xlabel("ms per call")
    panel.set_ylabel("\n".join(textwrap.wrap(f"{report.loss}, %", 44)))
    panel.margins(0.1)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.suptitle(f"{report.model} on {report.images}", fontsize=9)
    _save(figure, path)


def _draw_run(panel: Any, run: Run) -> None:
    for place, variant in enumerate(run.variants):
        left, right = variant.median_ms - variant.p20_ms, variant.p90_ms - variant.median_ms
        panel.barh(
            place, variant.median_ms, xerr=[[left], [right]], color=_COLOURS[variant.name],
            height=0.7, capsize=3,
        )  # fmt: skip
        beside = ("axes fraction", "data")
        panel.annotate(_found(variant), (1.02, place), xycoords=beside, va="center", fontsize=8)
    panel.set_yticks(range(len(run.variants)), [variant.name for variant in run.variants])
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(
        f"{run.backend} {run.device} {run.precision}, batch {run.batch}", loc="left", fontsize=9
    )


def _found(variant: Variant) -> str:
    words = [f"{variant.median_ms:.2f} ms"]
    if variant.speedup:
        words.append(times(variant.speedup))
    if variant.overhead:
        words.append(f"{percent(variant.overhead)} over bound")
    return ",  ".join(words)
