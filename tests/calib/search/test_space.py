"""The space: finite, written as schedules that parse, and drawn from."""

from __future__ import annotations

import pytest

from tomexport.calib.search.space import EVERY, Point, Space
from tomexport.errors import UnknownNameError
from tomexport.plan import Plan, Schedule


def _space(families=EVERY, methods=("tome",), precisions=("f32",)):
    return Space(methods, families, precisions, tokens=64, n_calls=6)


def test_every_choice_is_a_schedule():
    texts = [_space().schedule(choices) for choices in _space().all()]
    assert len(set(texts)) == len(texts)
    parsed = [Schedule.parse(text) for text in texts if not text.startswith("list:")]
    assert {schedule.kind for schedule in parsed} == set(EVERY) - {"list"}
    assert "keep:0.7@1,3,4" in texts
    assert "exp:0.25,0" in texts


def test_a_space_is_the_product_of_its_parts():
    one = len(list(_space(("none", "const")).all()))
    assert one == 1 + 13  # 1.2 × 64 / 6
    more = _space(("none", "const"), ("tome", "evit"), ("f32", "bf16", "int8"))
    assert len(list(more.all())) == 6 * one


def test_what_a_trial_draws_is_in_the_space():
    class First:
        def __init__(self):
            self.params = {}

        def suggest_categorical(self, name, values):
            self.params[name] = values[-1]
            return values[-1]

        def suggest_int(self, name, low, high):
            self.params[name] = high

    space = _space(("none", "exp"))
    assert space.draw(First()) in list(space.all())
    assert space.schedule(space.draw(First())) == "exp:0.5,0.9"


def test_a_family_that_there_is_not():
    with pytest.raises(UnknownNameError, match="Unknown family of schedules 'exponential'"):
        _space(("exponential",))


def test_points_that_compute_the_same_have_one_key():
    def point(schedule, precision="f32", method="tome", removed=(3, 0)):
        return Point(method, schedule, precision, removed, 1.0).key

    assert point("exp:0.25,0") == point("list:3")
    assert point("none", removed=(0, 0)) == point("none", method="evit", removed=(0, 0))
    assert len({point("a"), point("a", "bf16"), point("a", method="evit"),
                point("a", removed=(0, 3))}) == 4  # fmt: skip


def test_a_point_takes_its_counts_from_the_plan(plan_of):
    plan: Plan = plan_of("const:8")
    point = Point.of(plan, "bf16")
    assert point.removed == tuple(step.removed for step in plan.steps)
    assert point.gmac == pytest.approx(plan.macs / 1e9, abs=1e-4)
