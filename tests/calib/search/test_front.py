"""The front: what nothing beats; and what is taken of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.made_up_search import measured
from tomexport.calib.search.front import Limits, Measured, on_front
from tomexport.errors import ArtifactError


def test_the_front_is_that_of_brute_force():
    drawn = np.random.default_rng(0).integers(1, 50, size=(200, 3)).tolist()
    points = [measured(ratio, loss, divergence) for ratio, loss, divergence in drawn]
    front = {tuple(row) for row, best in zip(drawn, on_front(points), strict=True) if best}
    wanted = {
        (ratio, loss, divergence)
        for ratio, loss, divergence in map(tuple, drawn)
        if not any(
            r <= ratio
            and (own, d) <= (loss, divergence)
            and (r, own, d) != (ratio, loss, divergence)
            for r, own, d in drawn
        )
    }
    assert front == wanted
    assert 1 < len(front) < 30


def test_equal_points_do_not_beat_each_other():
    assert on_front([measured(0.5, 0.1), measured(0.5, 0.1)]) == [True, True]


def test_with_a_limit_of_loss_the_fastest_is_taken():
    points = [measured(0.5, 0.2), measured(0.7, 0.01), measured(0.8, 0.0)]
    assert Limits(drop=0.01).choose(points, 10) is points[1]
    assert Limits(drop=0.0).choose(points, 10) is points[2]
    assert Limits(drop=0.01).rule == (
        "the fastest with a loss of at most 1.00% on both halves of the images"
    )


def test_the_loss_must_hold_on_images_held_out():
    lucky, honest = measured(0.5, 0.0, held_out_loss=0.1), measured(0.6, 0.01)
    assert Limits(drop=0.01).choose([lucky, honest], 10) is honest


def test_without_a_limit_of_loss_what_loses_least_is_taken():
    points = [measured(0.5, 0.2, gmac=0.5), measured(0.7, 0.01, gmac=0.7), measured(0.9, 0.0)]
    assert Limits(latency_ms=7).choose(points, 10) is points[1]
    assert Limits(latency_ms=6.9).choose(points, 10) is points[0]
    assert Limits(gmac=0.7).choose(points, 10) is points[1]
    assert Limits(latency_ms=4, gmac=0.7).choose(points, 10) is None
    assert Limits(latency_ms=4, gmac=0.7).rule == (
        "the one that loses least with at most 4 ms and at most 0.7 GMACs"
    )


def test_how_far_a_point_is_beyond_the_limits():
    point = measured(0.8, 0.03)
    assert Limits(latency_ms=4, drop=0.01).excess(point, 10) == pytest.approx(
        {"latency": 1.0, "drop": 0.02}
    )
    assert Limits(gmac=1).excess(point, 10) == {}


def test_what_was_measured_survives_json():
    point = measured(0.5, 0.25, 0.1, held_out_loss=0.3)
    assert Measured.from_dict(json.loads(json.dumps(point.to_dict()))) == point


@pytest.mark.parametrize(
    "damage", [{"loss": "much"}, {"ratio": 3}, {"removed": None}, {"gmac": []}]
)
def test_a_damaged_trial_is_refused(damage):
    with pytest.raises(ArtifactError, match="A trial in the storage is damaged"):
        Measured.from_dict(measured(0.5, 0.25).to_dict() | damage)
