"""Schedules of each kind that compute as much as a constant one, so that only shapes differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tomexport.exporter.families import family_of
from tomexport.exporter.methods.tome import TOME
from tomexport.exporter.source import find
from tomexport.plan import Plan, Schedule

CONSTANTS = ("const:5", "const:8")
_FINEST = 800  # steps of an exponential schedule's first share, up to a half
# ways to write a schedule by one number, which removes more the larger it is; and the largest
_KINDS: tuple[tuple[Callable[[int], str], int], ...] = (
    (lambda i: f"linear:{i}", 100),
    (lambda i: f"exp:{i / (2 * _FINEST):.5g},0", _FINEST),
    (lambda i: f"exp:{i / (2 * _FINEST):.5g},0.5", _FINEST),
)


def equal(model: Path) -> dict[str, float]:
    """Find, for each constant schedule, those of other kinds whose MACs come closest to its.

    Args:
        model: a checkpoint.

    Returns:
        Schedules, and their MACs as a share of the unmerged model's.
    """
    found = find(model)
    cost = family_of(found.model).cost(found.model, found.name)

    def share(schedule: str) -> float:
        plan = Plan.make(cost, Schedule.parse(schedule), TOME.name, TOME.counting)
        return plan.macs / plan.macs_unreduced

    schedules = ["none"]
    for constant in CONSTANTS:
        schedules += [constant, *(_closest(*kind, share, share(constant)) for kind in _KINDS)]
    return {schedule: share(schedule) for schedule in schedules}


def _closest(
    write: Callable[[int], str], count: int, share: Callable[[str], float], target: float
) -> str:
    """Halve the range until two neighbours are left, and take the closer one."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(write(middle)) > target else (low, middle)
    return min((write(low), write(high)), key=lambda each: abs(share(each) - target))
