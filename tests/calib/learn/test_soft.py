"""Soft grouping against the merge it stands for, and against its rule written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import tomexport
from tomexport.calib.learn.soft import SOFT, group, select
from tomexport.exporter.families import family_of
from tomexport.exporter.rewrite import ReducedModel
from tomexport.kernels.merge.reference import merge
from tomexport.plan import Plan, Schedule

COLD = 1e-4  # towards 0, where decisions are hard


def _drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _class_token(x, size):
    """What a class token gets that attends to these by their sizes, (B, C)."""
    query = _drawn(1, 1, x.shape[2], seed=9)
    scores = (query @ x.mT) / math.sqrt(x.shape[2]) + size.log().mT
    return (scores.softmax(dim=2) @ x)[:, 0]


@pytest.mark.parametrize("n_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("n", "r"), [(12, 3), (13, 4), (17, 1)])
def test_at_low_temperature_it_is_the_merge_of_the_exported_model(n, r, n_prefix):
    x, size = _drawn(3, n, 8), 1 + _drawn(3, n, 1, seed=1).abs()
    embedding = _drawn(3, n, 6, seed=2)
    hard_x, hard_size, _ = merge(x, size, embedding[:, None].float(), r=r, n_prefix=n_prefix)
    soft_x, soft_size = group(x, size, embedding, n, r, n_prefix, temperature=COLD)
    assert soft_x.shape == x.shape, "all tokens stay"
    assert soft_size[:, n - r :].abs().max() < 1e-9, "what was absorbed is behind"
    expected, found = _class_token(hard_x, hard_size), _class_token(soft_x, soft_size)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    left = soft_size[:, : n - r]
    assert torch.allclose(left.sort(1).values, hard_size.sort(1).values, atol=1e-9)


def test_the_heaviest_come_first_behind_the_prefix():
    x, size = _drawn(2, 15, 4), torch.ones(2, 15, 1, dtype=torch.float64)
    out, weight = group(x, size, _drawn(2, 15, 4, seed=1), 15, 5, 1)
    assert torch.equal(out[:, 0], x[:, 0])
    assert (weight[:, 1:-1] >= weight[:, 2:]).all()


def test_those_behind_the_first_n_take_no_part():
    x, size = _drawn(2, 15, 4), torch.ones(2, 15, 1, dtype=torch.float64)
    out, weight = group(x, size, _drawn(2, 15, 4, seed=1), 11, 3, 1)
    assert torch.equal(out[:, 11:], x[:, 11:])
    assert torch.equal(weight[:, 11:], size[:, 11:])
    assert not torch.equal(out[:, 1:11], x[:, 1:11])


@pytest.mark.parametrize("temperature", [COLD, 0.1, 1.0])
def test_sizes_are_conserved(temperature):
    size = 1 + _drawn(2, 21, 1, seed=1).abs()
    for r in (1, 5, 10):
        _, weight = group(_drawn(2, 21, 4), size, _drawn(2, 21, 4, seed=3), 21, r, 1, temperature)
        assert (weight > 0).all()
        assert torch.allclose(weight.sum(1), size.sum(1), rtol=0, atol=1e-9)


def _selected_by_hand(scores, r, temperature):
    """One image, in plain Python: A × B."""
    n_a, n_b = scores.shape
    best = [sorted(range(n_b), key=lambda j: -scores[i, j])[:3] for i in range(n_a)]
    logit = {(i, j): float(scores[i, j]) / 0.1 for i in range(n_a) for j in best[i]}
    total = dict.fromkeys(logit, 0.0)
    for _ in range(r):
        top = max(logit.values())
        weight = {edge: math.exp((value - top) / temperature) for edge, value in logit.items()}
        whole = sum(weight.values())
        p = {edge: value / whole for edge, value in weight.items()}
        row = [sum(p[i, j] for j in best[i]) for i in range(n_a)]
        for i, j in logit:
            total[i, j] += p[i, j]
            logit[i, j] += math.log(max(1 - row[i], 1e-12))
    result = torch.zeros_like(scores)
    for i in range(n_a):
        much = max(1.0, sum(total[i, j] for j in best[i]))
        for j in best[i]:
            result[i, j] = total[i, j] / much
    return result


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_edges_are_selected_as_the_rule_says(temperature):
    scores = _drawn(2, 6, 5).tanh()
    found = select(scores, 4, temperature)
    for image in range(2):
        expected = _selected_by_hand(scores[image], 4, temperature)
        assert torch.allclose(found[image], expected, rtol=0, atol=1e-9)


def test_each_token_goes_to_three_others_at_most_and_never_more_than_whole():
    found = select(_drawn(2, 6, 9), 6, 1.0)
    assert ((found > 0).sum(dim=2) == 3).all()
    assert (found.sum(dim=2) <= 1 + 1e-12).all()


def test_gradients_are_those_of_the_values():
    """By finite differences, where nothing is clipped: clipping leaves gradients as they are."""
    x, size = _drawn(1, 9, 3), 1 + _drawn(1, 9, 1, seed=1).abs()

    def compute(embedding):
        out, weight = group(x, size, embedding, 9, 2, 1, temperature=20.0)
        return _class_token(out, weight)

    assert torch.autograd.gradcheck(compute, _drawn(1, 9, 4, seed=2).requires_grad_())


def test_gradients_reach_the_embeddings_and_nothing_else(seeded):
    model = seeded("test_vit")
    layers = [torch.nn.Linear(64, 24) for _ in model.blocks]
    cost = family_of(model).cost(model, "test_vit")
    plan = Plan.make(cost, Schedule.parse("list:0,9,9,0,9"), "dtem", SOFT.counting)
    own = [each if step.removed else None for each, step in zip(layers, plan.steps, strict=True)]
    soft = ReducedModel(model, plan, SOFT, own=own)
    soft.net.requires_grad_(False)
    try:
        image = _drawn(2, 3, 160, 160).float()
        functional.cross_entropy(soft(image), torch.tensor([3, 5])).backward()
        moved = [each.weight.grad is not None and bool(each.weight.grad.any()) for each in layers]
        assert moved == [False, True, True, False, True, False]
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.requires_grad_(True)
    with torch.no_grad():
        unmerged = tomexport.reduce(model, "none")(image)
        assert not torch.allclose(soft(image), unmerged, atol=1e-3)
