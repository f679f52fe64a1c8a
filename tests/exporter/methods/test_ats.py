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


def _asked(block: Block):
    """Tokens that ATS takes: as many samples as tokens, at even steps of their cumulative score."""
    scores = []
    for i in range(1, len(block.x)):
        length = math.sqrt(sum(float(v[i] @ v[i]) for v in block.v))
        scores.append(float(block.attention[:, 0, i].sum()) * length)
    n, so_far, total = len(scores), [], 0.0
    for score in scores:
        total += score / sum(scores)
        so_far.append(total)
    nearest = [min(range(n), key=lambda i: abs(so_far[i] - (k + 0.5) / n)) for k in range(n)]
    return 1 + len(set(nearest))


def test_the_export_says_how_many_images_ask_for_more(seeded, natural_images, tmp_path):
    """At places whose budget is what ATS takes of one image, another may ask for more."""
    model, asked = seeded("test_vit"), []

    def rule(block: Block):
        if block.index == 1:
            asked[-1].append(_asked(block))
        return _rule(block)

    for image in natural_images(160):
        asked.append([])
        with torch.no_grad():
            by_hand.forward(model, torch.from_numpy(image[None]), between=rule)
    counts = [each[0] for each in asked]
    kept = 1 + math.ceil(0.6 * 100)
    n_beyond = sum(count > kept for count in counts)
    path = tmp_path / "model.onnx"
    report = tomexport.export(
        model,
        "keep:0.6@1",
        path,
        method="ats",
        verify=False,
        images=lambda metadata: (natural_images(160), "photographs"),
    )
    assert report.notes[-1] == (
        f"{n_beyond} of 4 images (photographs) ask ats for more tokens than are kept: blocks.1 "
        f"keeps {kept}, they ask for {min(counts)} to {max(counts)}"
    )
    other = tomexport.export(model, "keep:0.9@1", path, method="ats", verify=False, force=True)
    assert "of 8 images (golden set) ask ats" in other.notes[-1]
