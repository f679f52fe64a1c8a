"""The study's schedules compute equally much, and its page says what was found. No speeds."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.study import digits, page
from benchmarks.study.schedules import CONSTANTS, equal


def test_schedules_of_a_group_compute_equally_much(tmp_path):
    torch.save(digits.untrained().state_dict(), tmp_path / "digits.pth")
    shares = equal(tmp_path / "digits.pth")
    assert shares.pop("none") == 1
    groups = [list(shares)[:4], list(shares)[4:]]
    for constant, group in zip(CONSTANTS, groups, strict=True):
        assert [each.split(":")[0] for each in group] == ["const", "linear", "exp", "exp"]
        assert group[0] == constant
        assert all(abs(shares[each] - shares[constant]) < 0.015 for each in group)


def _row(schedule, runtime, precision, top1, speedup):
    return {
        "schedule": schedule, "runtime": runtime, "precision": precision, "macs": 0.7,
        "top1": top1, "top1_low": top1 - 0.1, "top1_high": top1, "ms": 1.0,
        "speedup": speedup, "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1,
    }  # fmt: skip


def _point(schedule, ratio, loss):
    interval = {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01}
    return {
        "schedule": schedule, "gmac": 0.02, "latency_ms": ratio, "ratio": interval, "loss": loss,
        "held_out_loss": loss, "on_front": True,
    }  # fmt: skip


@pytest.fixture
def study():
    rows = [
        _row(schedule, runtime, precision, 0.9, 1.0 if schedule == "none" else 1.5)
        for schedule in ("none", "const:5")
        for runtime in page.RUNTIMES
        for precision in ("f32", "int8")
    ]
    points = [_point("none", 1, 0), _point("const:5", 0.8, 0.02), _point("list:0,9", 0.6, 0.01)]
    estimate = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 100}
    likeness = {"top1": estimate, "kl": estimate, "cosine": estimate}
    learned = {"schedule": "const:13", "before": likeness, "after": likeness, "verdict": "helps"}
    return {
        "accuracy": 0.97, "n_held_out": 500, "threads": 2, "machine": {"cpu": "A CPU"},
        "rows": rows, "search": {"points": points, "minutes": 2.5}, "learn": [learned],
    }  # fmt: skip


def test_the_page_has_a_row_for_everything(study):
    text = page.page(study)
    assert "| `none` | 70.0% | 90.0, 1 | 90.0, 1.00× (0.90–1.10) |" in text
    assert "| `const:5` | 70.0% | 90.0, 1.50× (1.40–1.60) |" in text
    assert "| `list:0,9` | 0.0200 | 0.600 | 1.0% | 1.0% |" in text
    assert "`list:0,9` is 1.33× as fast as `const:5`, and loses no more" in text
    assert "| `const:13` | 90.0 %, 0.9000 | 90.0 %, 0.9000 | helps |" in text


def test_a_point_that_loses_more_does_not_beat_a_constant_one(study):
    study["search"]["points"][2]["held_out_loss"] = 0.03
    assert "No point of it is faster" in page.page(study)


def test_the_readme_shows_the_results():
    readme = page.README.read_text()
    study = json.loads(page.RESULTS.read_text())
    assert page.with_tables(readme, study) == readme, "run: python -m benchmarks.study --publish"
