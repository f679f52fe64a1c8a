"""A search that nobody made, for tests of what is said and shown of one."""

from __future__ import annotations

from typing import Any

from tomexport.calib.search.front import Measured, on_front
from tomexport.calib.search.search import SearchReport
from tomexport.runtime.timing import Interval


def measured(ratio: float, loss: float, divergence: float = 0.0, **others: Any) -> Measured:
    point = {
        "method": "tome", "schedule": "const:1", "precision": "f32", "removed": (1,), "gmac": 1.0,
        "held_out_loss": loss,
    }  # fmt: skip
    return Measured(
        **point | others, ratio=Interval(ratio, ratio, ratio), loss=loss, divergence=divergence,
        held_out_divergence=divergence,
    )  # fmt: skip


def report(chosen: int | None = 1) -> SearchReport:
    points = (
        measured(0.5, 0.25, schedule="list:0,0,4,9", gmac=0.6),
        measured(0.8, 0.01, held_out_loss=0.02, schedule="exp:0.25,0", gmac=0.8),
        measured(0.9, 0.05, schedule="const:2", gmac=0.9),
        measured(1.0, 0.0, schedule="none"),
    )
    return SearchReport(
        None if chosen is None else "best.onnx", "test_vit", points, tuple(on_front(points)),
        chosen, "the fastest with a loss of at most 2.00%",
        {"latency_ms": 10.0, "gmac": 1.0, "top1": 0.9, "held_out_top1": 0.8},
        "all of photos: 30 searched on, 30 held out", "top-1 accuracy lost", {"cpu": "made up"},
        (),
    )  # fmt: skip
