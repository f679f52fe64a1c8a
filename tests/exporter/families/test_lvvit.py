"""LV-ViT reduced: its head over fewer tokens, its costs, other sizes, and both runtimes."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter import lvvit_by_hand


@pytest.fixture
def model(seeded):
    return seeded("lvvit_s", depth=3)


def test_the_second_classifier_reads_what_is_left(model, natural_images):
    image = torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, "list:0,97,0", method="random")
    with torch.no_grad():
        found, fixed = reduced(image)[0], reduced.plan.steps[1]
        x = model.embed(image)
        for block in model.blocks[:2]:
            x = x + block.attn(block.norm1(x)) / 2
            if block is model.blocks[1]:
                x = _kept(x, fixed.tokens_out)
            x = x + block.mlp(block.norm2(x)) / 2
        x = model.norm(model.blocks[2](x))[0]
        expected = model.head(x[0]) + model.aux_head(x[1:]).max(0).values / 2
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def _kept(x, n):
    import numpy as np

    order = np.random.default_rng(x.shape[1] - 1).permutation(x.shape[1] - 1)
    kept = sorted(range(len(order)), key=lambda i: -order[i])[: n - 1]
    return x[:, [0, *(1 + i for i in kept)]]


@pytest.mark.parametrize("method", ["tome", "evit"])
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(model, tmp_path, method, suffix):
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(model, "list:8,8,8", path, method=method)
    assert report.verify.passed
    assert len(report.metadata.decisions) == 3, "the head reads all tokens of the last block"


def test_another_image_size(model, natural_images):
    image = torch.from_numpy(natural_images(256)[:1])
    reduced = tomexport.reduce(model, "none", img_size=(256, 256))
    state = reduced.net.state_dict()
    assert state["pos_embed"].shape[1] == 257
    with torch.no_grad():
        found = reduced(image)[0]
        expected = lvvit_by_hand.forward(state, image[0], 6)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.pos_embed.shape[1] == 197, "the model that was given stays as it was"


def test_without_classes_only_the_class_token_is_read(seeded, natural_images):
    model = seeded("lvvit_s", depth=3, num_classes=0)
    image = torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, "const:8")
    assert reduced.output == "features"
    assert reduced.plan.macs_spared > 0
    with torch.no_grad():
        whole = tomexport.reduce(model, "none")(image)
        assert (whole - model(image)).abs().max() <= 2e-6 * whole.abs().max()
        assert reduced(image).shape == (1, 384)
