"""eTPS against its rule written by hand, and in both runtimes."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block

NAME = "deit_tiny_patch16_224"
# two implementations in float32: measured 2e-6 of the largest output
TOLERANCE = 1e-5


def _etps(kept):
    def rule(block: Block):
        if block.index not in kept:
            return block.x, block.sizes
        scores = block.attention[:, 0, 1:].mean(0).tolist()
        x = by_hand.squeezed(block.x, scores, kept[block.index])
        return x, torch.ones(len(x))

    return rule


def test_the_others_join_the_kept_as_by_hand(seeded, natural_images):
    model = seeded(NAME, depth=4)
    image = torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, "keep:0.7@0,1,2", method="etps")
    with torch.no_grad():
        expected = by_hand.forward(model, image, between=_etps({0: 137, 1: 96, 2: 67}))
        found, decisions = reduced.trace(image)
        assert (found - model(image)).abs().max() > 1e-3, "nothing was squeezed"
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert [sorted(set(d.target[0].tolist())) for d in decisions] == [
        list(range(n)) for n in (138, 97, 68)
    ]


def test_one_that_is_kept_takes_all(seeded, natural_images):
    model = seeded("test_vit")
    image = torch.from_numpy(natural_images(160)[:1])
    reduced = tomexport.reduce(model, "list:0,99", method="etps")
    with torch.no_grad():
        expected = by_hand.forward(model, image, between=_etps({1: 1}))
        found = reduced(image)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(seeded, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(seeded("test_vit"), "keep:0.7@1,3", path, method="etps")
    assert report.verify.passed
    assert len(report.metadata.decisions) == 2


def test_counts_are_shares_of_the_first():
    plan = tomexport.plan("deit_small_patch16_224", "keep:0.7@3,6,9", method="etps")
    assert [plan.steps[place].tokens_out for place in (3, 6, 9)] == [138, 97, 68]
    assert plan.macs / 1e9 == pytest.approx(3.0, rel=0.01)
