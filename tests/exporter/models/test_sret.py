"""SReT: the published sizes and keys, and the same output as a second implementation."""

from __future__ import annotations

import itertools

import pytest
import torch

import tomexport
from tests.exporter import sret_by_hand
from tomexport.errors import CheckpointError, RewriteError
from tomexport.exporter.models.sret import VARIANTS
from tomexport.exporter.zoo import skeleton, timm

WHOLE = ((1, 1), (1, 1), (1, 1))
# float32 against float64, 20 calls: measured 2e-6 of the largest output
TOLERANCE = 1e-5


def expected_shapes(dims, mlp, extra, side=28, classes=1000):
    """The keys of a published checkpoint, from its description."""
    c = dims[0]
    shapes = {"pos_embed": (1, c, side, side)}
    for i, (before, after) in enumerate([(3, c // 2), (c // 2, c), (c, c)], start=1):
        shapes[f"patch_embed.conv{i}.weight"] = (after, before, 3, 3)
        shapes[f"patch_embed.conv{i}.bias"] = (after,)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.bn{i}.{name}"] = (after,)
        shapes[f"patch_embed.bn{i}.num_batches_tracked"] = ()

    def linear(name, before, after):
        return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}

    for stage, n_calls in enumerate((4, 10, 6)):
        dim = dims[stage]
        for i in range(2 * n_calls):
            at = f"transformers.{stage}.blocks.{i}."
            hidden = extra[stage] if i % 2 else mlp[stage]
            shapes |= linear(f"{at}mlp.fc1", dim, hidden) | linear(f"{at}mlp.fc2", hidden, dim)
            norms, n_factors = (("norm1",), 2) if i % 2 else (("norm1", "norm2"), 4)
            for norm, part in itertools.product(norms, ("weight", "bias")):
                shapes[f"{at}{norm}.{part}"] = (dim,)
            for factor in range(1, n_factors + 1):
                shapes[f"{at}coefficient{factor}.bias"] = (1,)
            if i % 2 == 0:
                shapes |= linear(f"{at}attn.qkv", dim, 3 * dim)
                shapes |= linear(f"{at}attn.proj", dim, dim)
    for stage, dim in enumerate(dims[:-1]):
        shapes[f"pools.{stage}.conv.weight"] = (2 * dim, 1, 3, 3)
        shapes[f"pools.{stage}.conv.bias"] = (2 * dim,)
    shapes |= {"norm.weight": (dims[-1],), "norm.bias": (dims[-1],)}
    return shapes | linear("head", dims[-1], classes)


T = ((64, 128, 256), (230, 460, 921), (64, 128, 256))
LT = ((64, 128, 256), (256, 512, 1024), (64, 128, 256))
S = ((126, 252, 504), (378, 756, 1512), (252, 504, 1008))


@pytest.mark.parametrize(
    ("name", "sizes", "side", "n_parameters"),
    [
        ("sret_t", T, 28, 4_755_979),
        ("sret_t_distill", T, 28, 4_755_979),
        ("sret_t_wo_slice", T, 28, 4_755_979),
        ("sret_t_wo_slice_distill_384", T, 48, 4_853_259),
        ("sret_lt", LT, 28, 4_988_024),
        ("sret_lt_16_14_1", LT, 28, 4_988_024),
        ("sret_lt_wo_slice_distill", LT, 28, 4_988_024),
        ("sret_s", S, 28, 20_899_692),
        ("sret_s_wo_slice_384", S, 48, 21_091_212),
        ("sret_s_wo_slice_distill_512", S, 64, 21_317_004),
    ],
)
def test_keys_shapes_and_parameters_are_the_published(name, sizes, side, n_parameters):
    model = skeleton(name)
    state = model.state_dict()
    assert {key: tuple(t.shape) for key, t in state.items()} == expected_shapes(*sizes, side)
    assert len(state) == 510
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters
    distinct = {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert len(distinct) == 350


def test_every_name_is_in_the_registry():
    assert set(timm().list_models(module="sret")) == set(VARIANTS)


@pytest.mark.parametrize(
    ("name", "heads", "slices"),
    [
        ("sret_t", (2, 4, 8), sret_by_hand.SLICED),
        ("sret_lt_16_14_1", (2, 4, 8), ((16, 1), (14, 1), (1, 1))),
        ("sret_lt_wo_slice", (2, 4, 8), WHOLE),
        ("sret_s", (3, 6, 12), sret_by_hand.SLICED),
        ("sret_s_wo_slice", (3, 6, 12), WHOLE),
    ],
)
def test_the_network_equals_a_second_implementation(seeded, natural_images, name, heads, slices):
    model = seeded(name)
    image = torch.from_numpy(natural_images(224)[:1])
    with torch.no_grad():
        found = model(image)[0]
        expected = sret_by_hand.forward(model.state_dict(), image[0], heads, slices).logits
        reduced = tomexport.reduce(model, "none")(image)[0]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (reduced - found).abs().max() <= 2e-6 * found.abs().max()


def test_another_seed_is_another_order(seeded, natural_images):
    model, image = seeded("sret_t"), torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, "none", permutation_seed=3)
    with torch.no_grad():
        found, own = reduced(image)[0], model(image)[0]
        by_hand = sret_by_hand.forward(model.state_dict(), image[0], (2, 4, 8), seed=3).logits
    assert (found - by_hand).abs().max() <= TOLERANCE * by_hand.abs().max()
    assert (found - own).abs().max() > 1e-4, "the order changed nothing"
    assert model.permutation_seed == 0


def test_shared_blocks_are_one_module_and_extra_blocks_are_not(seeded):
    for stage in seeded("sret_t").transformers:
        blocks = stage.blocks
        assert all(blocks[i] is blocks[i + 2] for i in range(0, len(blocks), 4))
        assert len({id(block) for block in blocks}) == len(blocks) * 3 // 4


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(RewriteError, match=r"230×224 pixels must be multiples of 32"):
        skeleton("sret_t", img_size=(230, 224))
    with pytest.raises(RewriteError, match="stage 1 has 576 tokens, which do not divide into 14"):
        skeleton("sret_lt_16_14_1", img_size=384)


def test_weights_from_a_hub_and_unknown_options_are_refused():
    with pytest.raises(CheckpointError, match="on no hub that timm can reach"):
        timm().create_model("sret_t", pretrained=True)
    with pytest.raises(TypeError, match="depth"):
        timm().create_model("sret_t", depth=3)
