"""Figures by hand, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from tomexport.calib.fidelity import cosines, difference, divergences, hits, likeness, mean, share


def test_hits():
    logits = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0], [np.nan, 1.0, 2.0]])
    assert hits(logits, np.array([1, 0, 0])).tolist() == [True, True, False]
    assert hits(logits, np.array([2, 1, 2])).tolist() == [False, False, True]
    assert hits(logits, np.array([2, 1, 1]), k=2).tolist() == [True, True, True]
    assert hits(logits, np.array([0, 2, 0]), k=2).tolist() == [False, False, False]


def test_divergence_by_hand():
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    found = divergences(np.log(p)[None] + 300, np.log(q)[None] - 7)  # softmax knows no constant
    assert found == pytest.approx([expected])
    assert divergences(np.log(p)[None], np.log(p)[None]) == pytest.approx([0], abs=1e-12)


def test_cosine_by_hand():
    a = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], np.float32)
    b = np.array([[4.0, 3.0], [0.0, 2.0], [1.0, 1.0]], np.float32)
    assert cosines(a, b) == pytest.approx([24 / 25, 0, 0])


def test_likeness_of_logits_and_features():
    reference = np.eye(4) * 3
    other = reference.copy()
    other[0] = [0, 5, 0, 0]
    found = likeness(reference, other)
    assert found.top1.value == 0.75
    assert found.kl.value > 0
    assert found.cosine.value == 0.75
    features = likeness(reference, other, "features")
    assert features.top1 is None
    assert features.kl is None
    assert features.cosine == found.cosine


def test_wilson_as_published():
    found = share(np.array([True] * 81 + [False] * 182))  # Newcombe 1998, table I: 81 of 263
    assert (found.low, found.high) == (
        pytest.approx(0.2553, abs=1e-4),
        pytest.approx(0.3662, abs=1e-4),
    )
    all_of_ten = share(np.ones(10, bool))
    assert all_of_ten.high == pytest.approx(1)
    assert all_of_ten.low == pytest.approx(0.7225, abs=1e-4)


def test_paired_difference_as_published():
    # Newcombe 1998 (paired), table II: 36, 12, 2, 0 of 50 → 0.2000 (0.0569 to 0.3404)
    a = np.array([True] * 36 + [True] * 12 + [False] * 2)
    b = np.array([True] * 36 + [False] * 12 + [True] * 2)
    found = difference(a, b)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (
        pytest.approx(0.0569, abs=1e-4),
        pytest.approx(0.3404, abs=1e-4),
    )


def test_pairs_narrow_the_interval_and_equality_is_no_certainty():
    right = np.random.default_rng(0).random(400) < 0.7
    worse = right & (np.random.default_rng(1).random(400) < 0.97)
    paired = difference(worse, right)
    mixed = difference(np.random.default_rng(2).permutation(worse), right)
    assert paired.high - paired.low < 0.5 * (mixed.high - mixed.low)
    same = difference(right, right)
    assert same.value == 0
    assert -0.02 < same.low < 0 < same.high < 0.02


def test_the_mean_lies_within_its_interval_95_times_of_100():
    random = np.random.default_rng(5)
    inside = [
        (found := mean(random.exponential(size=60))).low <= 1 <= found.high for _ in range(60)
    ]
    assert 0.8 <= np.mean(inside) <= 1
