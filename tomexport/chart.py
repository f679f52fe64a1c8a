"""A profile as a picture: the latency of each variant, with what was found beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tomexport import scratch
from tomexport.delivery import check_file
from tomexport.errors import ExportError, need
from tomexport.runtime.baselines import BOUND, FUSED, NONE, PORTABLE
from tomexport.runtime.profile import ProfileReport, Run, Variant, percent, times

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
    try:
        with scratch.folder(path) as folder:
            figure.savefig(folder / path.name, dpi=150)
            (folder / path.name).replace(path)
    except OSError as err:
        raise ExportError(
            f"The chart {path} could not be written: {err.strerror or err}. Nothing was kept."
        ) from err


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
