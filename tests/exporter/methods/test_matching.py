"""Matching as methods trace it: as the operator does it; who leads a slot; the order of slots."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import tomexport
from tomexport.exporter.methods.matching import by_parity, match
from tomexport.exporter.methods.method import in_raster_order
from tomexport.kernels import raster
from tomexport.kernels.merge import reference


@pytest.mark.parametrize(("n", "n_prefix"), [*itertools.product((9, 10, 50), (0, 1, 2, 5))])
def test_matching_is_that_of_the_operator(n, n_prefix):
    keys = torch.randn(3, 2, n, 8, generator=torch.Generator().manual_seed(n))
    keys[:, :, 6] = keys[:, :, 8]  # a tie
    scores = reference._scores(keys, n_prefix)
    for r in range(1, (n - n_prefix) // 2 + 1):
        found = match(scores, by_parity(n, n_prefix), r, n_prefix)
        assert torch.equal(found.target, reference.match(keys, r, n_prefix))
        assert found.goes.sum(1).tolist() == [r] * 3


def test_raster_order_is_that_of_the_operators():
    generator = torch.Generator().manual_seed(0)
    target = torch.stack([torch.randperm(20, generator=generator) % 13 for _ in range(4)])
    assert torch.equal(in_raster_order(target), raster.in_raster_order(target, 13))
    assert in_raster_order(torch.tensor([[2, -1, 0, 2, -1, 1]])).tolist() == [[0, -1, 1, 0, -1, 2]]


@pytest.mark.parametrize("method", ["tome:similarity=dot", "tofu", "pitome", "diffrate"])
def test_each_slot_is_led_by_the_token_that_others_join(seeded, natural_images, method):
    """Where attention reads places, a merged token keeps that of the one it merged into."""
    reduced = tomexport.reduce(seeded("test_vit"), "const:20", method=method)
    found = []

    def watched(view, reduce=reduced._method.reduce):
        found.append(reduce(view))
        return found[-1]

    reduced._method = dataclasses.replace(reduced._method, reduce=watched)
    with torch.no_grad():
        reduced(torch.from_numpy(natural_images(160)))
    for left in found:
        leads = left.leads.expand(left.target.shape)
        for target, leading in zip(left.target, leads, strict=True):
            assert target[leading].sort().values.tolist() == list(range(left.x.shape[1]))
