"""A profile that nobody measured, for tests of what is said and shown of one."""

from __future__ import annotations

from typing import Any

from tomexport.runtime.backend import OperatorTime
from tomexport.runtime.profile import ProfileReport, Run, Variant
from tomexport.runtime.timing import Interval

OPERATORS = (OperatorTime("Gemm", False, 12, 900.0), OperatorTime("Merge", True, 6, 100.0))


def variant(name: str, ms: float, **found: Any) -> Variant:
    unknown = dict.fromkeys(("speedup", "overhead", "us_per_merge", "share_of_bound"))
    times = {"median_ms": ms, "p20_ms": 0.95 * ms, "p90_ms": 1.2 * ms, "p99_ms": 2 * ms}
    rest = {"min_ms": 0.9 * ms, "spread": 0.25, "peak_memory": 200 * 2**20, "operators": ()}
    return Variant(
        name, f"model.{name}.onnx", 100, samples_ms=[[ms] * 5] * 20,
        **unknown | times | rest | found,
    )  # fmt: skip


def report(min_speedup: float | None = None) -> ProfileReport:
    """Return a profile with one run, 1.25 times as fast as unmerged."""
    speedup, overhead = Interval(1.25, 1.23, 1.27), Interval(0.03, 0.02, 0.04)
    variants = (
        variant("fused", 8.0, speedup=speedup, overhead=overhead, operators=OPERATORS,
                us_per_merge=Interval(39.0, 30.0, 50.0), share_of_bound=Interval(0.97, 0.96, 0.98)),
        variant("none", 10.0),
        variant("bound", 7.8, speedup=Interval(1.28, 1.26, 1.3)),
    )  # fmt: skip
    run = Run("onnxruntime", "CPU", "f32", 1, 2, (0, 1), 20, 2, 1.36, variants, "Merging pays.")
    return ProfileReport(
        "model.onnx", "test_vit", "tome", "const:8", 6, (run,), min_speedup, (),
        "2024-01-01T00:00:00Z", {"cpu": "a processor"}, {"tomexport": "0.1.0"},
    )  # fmt: skip
