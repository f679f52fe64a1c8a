"""Where an embedding starts, and the checkpoint that it ends in."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tomexport.calib.learn.embedding import attach, checkpoint, starting_from_keys, write
from tomexport.exporter.rewrite import private_copy
from tomexport.exporter.source import find

N_HEAD_FEATURES = 32  # of test_vit: width 64, 2 heads


def _layers(model, dim=N_HEAD_FEATURES):
    return [starting_from_keys(b.attn, dim, seed) for seed, b in enumerate(model.blocks)]


def _moved(layers):
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return layers


@pytest.fixture
def image():
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def carrying(seeded):
    def build(layers_of, **options):
        model = private_copy(seeded("test_vit", **options))
        attach(model, layers_of(model))
        return model

    return build


@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_as_tome(carrying, image, bias):
    model = carrying(_layers, qkv_bias=bias)
    learned = tomexport.reduce(model, "const:9")
    assert learned.plan.method == "dtem"
    with torch.no_grad():
        expected = tomexport.reduce(model, "const:9", method="tome").trace(image)
        found = learned.trace(image)
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-5)
    assert all(torch.equal(a.target, b.target) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize(("dim", "least"), [(16, 0.5), (48, 0.999)])
def test_other_widths_start_nearly_so(seeded, dim, least):
    """Of random weights, whose directions all count, half of them tell half of it."""
    (block, *_) = seeded("test_vit").blocks
    tokens = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))

    def cosines(width):
        with torch.no_grad():
            embedded = starting_from_keys(block.attn, width, 0)(tokens)
        direction = embedded / embedded.norm(dim=1, keepdim=True)
        return (direction @ direction.T).fill_diagonal_(0)

    assert starting_from_keys(block.attn, dim, 0).weight.norm(dim=1).min() > 0, "none is stuck at 0"
    keys, other = cosines(N_HEAD_FEATURES), cosines(dim)
    alike = torch.corrcoef(torch.stack([keys.flatten(), other.flatten()]))[0, 1]
    assert alike > least


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_says_all_by_itself(seeded, carrying, tmp_path, image, suffix):
    model = seeded("test_vit")
    layers = _moved(_layers(model))
    path = tmp_path / f"learned{suffix}"
    write(checkpoint(model, layers), "test_vit", path)
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode
    from_file = tomexport.reduce(path, "const:9")
    from_module = tomexport.reduce(carrying(lambda _: layers), "const:9")
    assert from_file.plan == from_module.plan
    assert from_file.plan.method == "dtem"
    assert find(path).sha256 == find(carrying(lambda _: layers)).sha256
    with torch.no_grad():
        assert torch.equal(from_file(image), from_module(image))
        assert not torch.allclose(
            from_file(image), tomexport.reduce(model, "const:9")(image), atol=1e-3
        )


def test_the_checkpoint_is_laid_out_as_published(seeded):
    model = seeded("test_vit")
    state = checkpoint(model, _layers(model))
    start = "blocks.3.attn.qkv"
    parts = [state[f"{start}.{part}.weight"] for part in ("qkv_layer", "metric_layer")]
    assert [tuple(part.shape) for part in parts] == [(192, 64), (N_HEAD_FEATURES, 64)]
    assert torch.equal(state[f"{start}.weight"], torch.cat(parts))
    assert torch.equal(state[f"{start}.qkv_layer.bias"], model.blocks[3].attn.qkv.bias)
    added = 4 * len(model.blocks)  # two more layers in each block, with two tensors each
    assert len(state) == len(model.state_dict()) + added


def test_a_module_that_carries_embeddings_computes_what_it_did(seeded, carrying, image):
    model = carrying(_layers)
    with torch.no_grad():
        assert torch.equal(model(image), seeded("test_vit")(image))
    plan = tomexport.plan(model, "none", method="tome")
    assert plan.macs == tomexport.plan(seeded("test_vit"), "none").macs
