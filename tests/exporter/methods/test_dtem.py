"""DTEM against its rule written by hand, its checkpoints, and in both runtimes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import tomexport
from tests.exporter import tome_by_hand
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block
from tomexport import pipeline
from tomexport.errors import CheckpointError, RewriteError, VerifyError
from tomexport.exporter.source import find
from tomexport.pipeline import reference

NAME = "deit_tiny_patch16_224"
TOLERANCE = 1e-5


def _embeddings(model, width=64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(model.embed_dim, width) for _ in model.blocks]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return layers


def _checkpoint(model, layers):
    """The keys of a file that training wrote, prefixed as it does; the fused weights are stale."""
    state = dict(model.state_dict())
    for index, layer in enumerate(layers):
        start = f"blocks.{index}.attn.qkv"
        for kind in ("weight", "bias"):
            qkv, own = state[f"{start}.{kind}"], getattr(layer, kind).detach()
            state[f"{start}.{kind}"] = torch.full_like(torch.cat([qkv, own]), 0.5)
            state[f"{start}.qkv_layer.{kind}"] = qkv
            state[f"{start}.metric_layer.{kind}"] = own
    return {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}


def _rule(layers, r, n_prefix=1):
    def rule(block: Block):
        removed = min(r, (len(block.x) - n_prefix) // 2)
        embedded = layers[block.index](block.h)
        x, sizes, _ = tome_by_hand.merge(block.x, block.sizes.tolist(), embedded, removed, n_prefix)
        return x, torch.tensor(sizes)

    return rule


@pytest.fixture
def file(tmp_path):
    def save(content, name="dtem"):
        path = tmp_path / f"{name}.pth.tar"
        torch.save(content, path)
        return path

    return save


@pytest.mark.parametrize("r", [8, 13])
def test_a_checkpoint_computes_what_the_rule_says(seeded, natural_images, file, r):
    model = seeded(NAME)
    layers = _embeddings(model)
    image = torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(file(_checkpoint(model, layers)), f"const:{r}", arch=NAME)
    assert reduced.plan.method == "dtem", "the keys say so"
    with torch.no_grad():
        expected = by_hand.forward(model, image, between=_rule(layers, r), biased=True)
        found = reduced(image)
        by_keys = tomexport.reduce(model, f"const:{r}")(image)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (found - by_keys).abs().max() > 1e-3, "the embedding decided nothing"


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(seeded, file, tmp_path, suffix):
    model = seeded("test_vit")
    path = file(_checkpoint(model, _embeddings(model, width=24)))
    out = tmp_path / f"model{suffix}"
    report = tomexport.export(path, "list:20,0,9", out, arch="test_vit", batch=None)
    assert report.verify.passed
    assert report.metadata.plan.method == "dtem"
    assert any("holds weights of dtem: blocks.0.attn.qkv" in note for note in report.notes)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_against_tells_other_embeddings(seeded, file, tmp_path, suffix):
    model = seeded("test_vit")
    path = file(_checkpoint(model, _embeddings(model)))
    out = tmp_path / f"model{suffix}"
    tomexport.export(path, "const:8", out, arch="test_vit", verify=False)
    assert reference(out, path)[0].reduced.shape == (8, 1000)
    other = file(_checkpoint(model, _embeddings(model, seed=4)), "other")
    with pytest.raises(VerifyError, match="not those that"):
        reference(out, other)


def test_other_methods_leave_the_embedding_out(seeded, file):
    model = seeded("test_vit")
    path = file(_checkpoint(model, _embeddings(model)))
    image = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = tomexport.reduce(path, "const:8", arch="test_vit", method="tome")(image)
        assert torch.equal(found, tomexport.reduce(model, "const:8")(image))


def test_seeded_embeddings_are_the_same_each_time_and_differ_by_block():
    twice = [
        tomexport.reduce("test_vit", "const:8", method="dtem", random_weights=seed).own
        for seed in (0, 0, 1)
    ]
    first, again, other = ([layer.weight for layer in own.values()] for own in twice)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_macs_count_the_embedding():
    """DeiT-S, r = 13: ToMe's 2.70 GMACs and 12 layers of 384 × 64 on the tokens met."""
    plan = tomexport.plan("deit_small_patch16_224", "const:13", method="dtem")
    tome = tomexport.plan("deit_small_patch16_224", "const:13")
    met = sum(step.tokens_in for step in plan.steps)
    assert plan.macs - tome.macs == 384 * 64 * met
    assert plan.macs / 1e9 == pytest.approx(2.70, rel=0.02)


def test_macs_are_those_of_the_embedding_in_the_file(seeded, file):
    model = seeded("test_vit")
    narrow, wide = (
        tomexport.plan(
            file(_checkpoint(model, _embeddings(model, width))), "const:8", arch="test_vit"
        )
        for width in (24, 64)
    )
    met = sum(step.tokens_in for step in narrow.steps)
    assert wide.macs - narrow.macs == 64 * (64 - 24) * met


def test_what_a_file_lacks_is_named(seeded, file):
    model = seeded("test_vit")
    content = _checkpoint(model, _embeddings(model))
    key = "module.blocks.1.attn.qkv.metric_layer.weight"
    content["state_dict"][key] = content["state_dict"][key][:5]
    with pytest.raises(CheckpointError, match="does not hold blocks") as of:
        tomexport.reduce(file(content), "const:8", arch="test_vit")
    assert "blocks.1.attn.qkv.metric_layer as dtem needs it" in str(of.value)
    assert "weight is 5×64" in str(of.value)
    del content["state_dict"][key]
    with pytest.raises(CheckpointError, match="1 key missing: weight"):
        tomexport.reduce(file(content), "const:8", arch="test_vit")


def test_a_model_without_embedding_is_refused(seeded):
    with pytest.raises(CheckpointError, match="has weights of its own"):
        tomexport.reduce(seeded("test_vit"), "const:8", method="dtem")


def test_weights_that_two_methods_have_need_a_name(seeded):
    found = dataclasses.replace(find(seeded("test_vit")), methods=("one", "two"))
    with pytest.raises(RewriteError, match="holds weights that one and two have alike"):
        pipeline.method_of(found, None)
