"""LV-ViT: the published sizes and keys, and the same output as a second implementation."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter import lvvit_by_hand
from tomexport.errors import CheckpointError, RewriteError
from tomexport.exporter.models.lvvit import VARIANTS
from tomexport.exporter.zoo import skeleton, timm

# float32 against float64: measured 1e-6 of the largest output
TOLERANCE = 1e-5


def expected_shapes(dim, depth, classes=1000):
    """The keys of a published checkpoint, from its description."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 197, dim)}
    for index, (before, side) in enumerate([(3, 7), (64, 3), (64, 3)], start=1):
        shapes[f"patch_embed.conv{index}.weight"] = (64, before, side, side)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.bn{index}.{name}"] = (64,)
        shapes[f"patch_embed.bn{index}.num_batches_tracked"] = ()
    shapes |= {"patch_embed.proj.weight": (dim, 64, 8, 8), "patch_embed.proj.bias": (dim,)}

    def linear(name, before, after):
        return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}

    for index in range(depth):
        at = f"blocks.{index}."
        shapes[f"{at}attn.qkv.weight"] = (3 * dim, dim)
        shapes |= linear(f"{at}attn.proj", dim, dim)
        shapes |= linear(f"{at}mlp.fc1", dim, 3 * dim) | linear(f"{at}mlp.fc2", 3 * dim, dim)
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}{norm}.weight": (dim,), f"{at}{norm}.bias": (dim,)}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    return shapes | linear("head", dim, classes) | linear("aux_head", dim, classes)


@pytest.mark.parametrize(
    ("name", "dim", "depth", "millions"),
    [("lvvit_s", 384, 16, 26), ("lvvit_m", 512, 20, 56)],
)
def test_keys_and_shapes_are_the_published(name, dim, depth, millions):
    model = skeleton(name)
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert state == expected_shapes(dim, depth)
    assert round(sum(each.numel() for each in model.parameters()) / 1e6) == millions


def test_every_name_is_in_the_registry():
    assert set(timm().list_models(module="lvvit")) == set(VARIANTS)


@pytest.mark.parametrize(("name", "heads"), [("lvvit_s", 6), ("lvvit_m", 8)])
def test_the_network_equals_a_second_implementation(seeded, natural_images, name, heads):
    model = seeded(name, depth=4)
    image = torch.from_numpy(natural_images(224)[:1])
    with torch.no_grad():
        found = model(image)[0]
        reduced = tomexport.reduce(model, "none")(image)[0]
        expected = lvvit_by_hand.forward(model.state_dict(), image[0], heads)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (reduced - found).abs().max() <= 2e-6 * found.abs().max()


def test_macs_are_the_published():
    plan = tomexport.plan("lvvit_s", "none")
    assert plan.macs / 1e9 == pytest.approx(6.6, rel=0.01)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(RewriteError, match=r"230×224 do not divide into; use multiples of 16"):
        skeleton("lvvit_s", img_size=(230, 224))


def test_weights_from_a_hub_and_unknown_options_are_refused():
    with pytest.raises(CheckpointError, match="on no hub that timm can reach"):
        timm().create_model("lvvit_s", pretrained=True)
    with pytest.raises(TypeError, match="qkv_bias"):
        timm().create_model("lvvit_s", qkv_bias=True)
