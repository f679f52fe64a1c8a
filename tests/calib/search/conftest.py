"""Plans that need no model."""

from __future__ import annotations

import pytest

from tomexport.plan import Cost, ModelCost, Plan, Schedule, Site

COST = ModelCost(
    "made up",
    tuple(
        Site(0, i, f"blocks.{i}", 65, 1, 1, Cost(before=4_000, pair=64, after=8_000, query=2_000))
        for i in range(6)
    ),
    fixed=100_000,
    n_read=1,
)


@pytest.fixture
def plan_of():
    """Plan a made-up model of 64 tokens and 6 blocks."""
    return lambda text: Plan.make(COST, Schedule.parse(text), "tome")
