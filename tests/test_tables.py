"""Tables for people: they fit the page, and no digit is cut off."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from tests import made_up_search
from tests.made_up_profile import report, variant
from tomexport import tables
from tomexport.runtime.timing import Interval


def _printed(renderable, width):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_profile_fits_a_hundred_columns():
    lines = _printed(tables.profile_table(report()), 100)
    assert max(map(len, lines)) <= 100
    assert lines[:3] == [
        "model.onnx: test_vit, tome, const:8",
        "",
        "onnxruntime CPU f32, batch 1, 2 threads on CPUs 0, 1, 20 rounds, 2 launches",
    ]
    fused = next(line for line in lines if line.startswith("fused"))
    assert fused.split() == ["fused", "8.00", "7.60", "9.60", "16.00", "200", "1.25×",
                             "(1.23–1.27)", "3.0%", "(2.0–4.0)", "39", "(30–50)"]  # fmt: skip
    assert "Merging pays." in lines
    assert "operators of fused, 1.00 ms as profiled: merging 10.0%" in lines
    assert "Merge     merging      6     16.7  10.0%" in lines


def test_the_widest_intervals_fit_too():
    made = report()
    wide = variant(
        "portable", 123.45, speedup=Interval(0.57, 0.41, 0.62),
        overhead=Interval(0.965, 0.799, 2.85), us_per_merge=Interval(1386, -283, 1605),
    )  # fmt: skip
    run = dataclasses.replace(made.runs[0], variants=(wide, *made.runs[0].variants[1:]))
    lines = _printed(tables.profile_table(dataclasses.replace(made, runs=(run,))), 100)
    assert any(line.endswith("96.5% (79.9–285.0) 1386 (-283–1605)") for line in lines)


def test_a_profile_that_is_too_slow_says_so():
    lines = _printed(tables.profile_table(report(min_speedup=1.3)), 100)
    assert "FAIL: the speed-up is below 1.3×" in lines
    assert not any("FAIL" in line for line in _printed(tables.profile_table(report(1.2)), 100))


def test_a_search_shows_what_nothing_beats():
    lines = _printed(tables.search_table(made_up_search.report()), 110)
    assert lines[0] == (
        "test_vit on all of photos: 30 searched on, 30 held out; 3 of 4 points that no other beats"
    )
    rows = [line.split() for line in lines[2:5]]
    assert rows == [
        ["list:0,0,4,9", "tome", "f32", "0.600", "5.00", "2.00×", "25.0%", "25.0%"],
        ["exp:0.25,0", "tome", "f32", "0.800", "8.00", "1.25×", "1.0%", "2.0%", "chosen"],
        ["none", "tome", "f32", "1.000", "10.00", "1.00×", "0.0%", "0.0%"],
    ]
    assert lines[5:] == [
        "unmerged, float32: 10.00 ms; the loss is top-1 accuracy lost",
        "best.onnx: the fastest with a loss of at most 2.00%",
    ]


def test_a_search_that_found_nothing_says_so():
    lines = _printed(tables.search_table(made_up_search.report(chosen=None)), 110)
    assert lines[-1] == "No point is the fastest with a loss of at most 2.00%."
