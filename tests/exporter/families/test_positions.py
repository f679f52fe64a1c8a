"""Rotations and relative biases of tokens that stand in other places than at first."""

from __future__ import annotations

import math

import pytest
import torch

from tomexport.exporter.families.positions import Relative, Rotary


@pytest.mark.parametrize("half", [False, True])
def test_a_rotation_is_one_of_complex_numbers_and_leaves_the_prefix_alone(half):
    angles = torch.tensor([[0.3, 1.1], [2.0, -0.7]])  # of two patches, for two pairs of channels
    layout = angles.repeat(1, 2) if half else angles.repeat_interleave(2, dim=1)
    rotary = Rotary(torch.cat([layout.sin(), layout.cos()], dim=1), n_prefix=1, half=half)
    x = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([[0, 2, 1]])
    q, k = rotary(x[:, :, :2], x, place)
    assert torch.equal(q, k[:, :, :2])
    assert torch.equal(k[0, 0, 0], x[0, 0, 0])
    for token, patch in ((1, 1), (2, 0)):
        for pair in range(2):
            a, b = (pair, pair + 2) if half else (2 * pair, 2 * pair + 1)
            before = complex(x[0, 0, token, a], x[0, 0, token, b])
            turn = complex(math.cos(angles[patch, pair]), math.sin(angles[patch, pair]))
            after = complex(k[0, 0, token, a], k[0, 0, token, b])
            assert abs(after - before * turn) < 1e-6


def test_places_that_are_their_own_change_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 4, generator=generator)
    rotary = Rotary(torch.randn(3, 4, 8, generator=generator), n_prefix=1, half=False)
    own = torch.arange(5).expand(2, -1)
    for found, expected in zip(rotary(x, x, own), rotary(x, x, None), strict=True):
        assert torch.equal(found, expected)
    relative = Relative(
        torch.randn(7, 3, generator=generator), torch.randint(7, (5, 5), generator=generator)
    )
    assert torch.equal(relative(own, 2)[1], relative(None, 2)[0])


def test_a_bias_has_the_rows_and_columns_of_the_places():
    table = torch.arange(9.0)[:, None] * torch.tensor([1.0, 10.0])  # of two heads
    relative = Relative(table, torch.arange(9).reshape(3, 3))
    found = relative(torch.tensor([[2, 0]]), None)
    assert found.tolist() == [[[[8, 6], [2, 0]], [[80, 60], [20, 0]]]]
