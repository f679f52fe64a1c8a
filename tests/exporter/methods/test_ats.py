"""ATS with a fixed budget against its rule written by hand, and in both runtimes."""

from __future__ import annotations

import math

import pytest
import torch

import tomexport
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block


def _rule(block: Block):
    if block.index not in (1, 3):
        return block.x, block.sizes
    scores = []
    for i in range(1, len(block.x)):
        length = math.sqrt(sum(float(v[i] @ v[i]) for v in block.v))
        scores.append(float(block.attention[:, 0, i].sum()) * length)
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = ranked[: math.ceil(0.6 * len(ranked))]
    return torch.stack([block.x[0], *(block.x[1 + i] for i in kept)]), block.sizes


def test_the_most_significant_are_kept_as_by_hand(seeded, natural_images):
    model = seeded("test_vit")
    image = torch.from_numpy(natural_images(160)[:1])
    with torch.no_grad():
        expected = by_hand.forward(model, image, between=_rule)
        found = tomexport.reduce(model, "keep:0.6@1,3", method="ats")(image)
        by_attention = tomexport.reduce(model, "keep:0.6@1,3", method="topk")(image)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - by_attention).abs().max() > 1e-4, "the values changed nothing"


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(seeded, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(seeded("test_vit"), "keep:0.6@1,3", path, method="ats")
    assert report.verify.passed


def test_the_plan_says_that_it_approximates():
    notes = tomexport.plan("test_vit", "keep:0.6@1,3", method="ats").notes
    assert any("an approximation of ATS" in note for note in notes)
    assert tomexport.plan("test_vit", "keep:0.6@1,3", method="topk").notes == ()
