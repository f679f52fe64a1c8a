"""Seeded weights: every value is drawn, and none is where initialisation leaves it."""

from __future__ import annotations

import torch

from tomexport.exporter.weights import seed_weights
from tomexport.exporter.zoo import timm


def test_every_parameter_and_statistic_is_drawn_from_the_seed():
    first, second, other = (
        seed_weights(timm().create_model("sret_t"), seed).state_dict() for seed in (0, 0, 1)
    )
    for name, values in first.items():
        assert torch.equal(values, second[name])
        if values.is_floating_point():
            assert not torch.equal(values, other[name]), name
            assert not torch.equal(values, torch.zeros_like(values)), name
            assert not torch.equal(values, torch.ones_like(values)), name


def test_scales_lie_around_one_and_variances_above_zero():
    state = seed_weights(timm().create_model("sret_t"), 0).state_dict()
    factors = torch.cat([v for k, v in state.items() if ".coefficient" in k])
    assert abs(factors.mean() - 1) < 0.05
    assert 0.1 < factors.std() < 0.3
    assert all((v > 0).all() for k, v in state.items() if k.endswith("running_var"))
