"""PVT: the published sizes and keys, and the same output as a second implementation."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter import hybrids_by_hand
from tests.exporter.hybrids import PVT_HEADS, small_pvt
from tomexport.errors import RewriteError
from tomexport.exporter.models.pvt import VARIANTS
from tomexport.exporter.zoo import skeleton, timm

# float32 against float64, of the largest output
TOLERANCE = 1e-5


def expected_shapes(depths, widths=(64, 128, 320, 512), mlps=(8, 8, 4, 4), classes=1000):
    """The keys of a published checkpoint, from its description."""
    shapes, before = {"cls_token": (1, 1, widths[-1])}, 3

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    for i, (depth, dim, mlp) in enumerate(zip(depths, widths, mlps, strict=True), start=1):
        side, reduction = (2, 4)[i == 1], (8, 4, 2, 1)[i - 1]
        layer(f"patch_embed{i}.proj", dim, before, side, side)
        layer(f"patch_embed{i}.norm", dim)
        shapes[f"pos_embed{i}"] = (1, (3136, 784, 196, 50)[i - 1], dim)
        for j in range(depth):
            at = f"block{i}.{j}."
            layer(f"{at}norm1", dim)
            layer(f"{at}norm2", dim)
            layer(f"{at}attn.q", dim, dim)
            layer(f"{at}attn.kv", 2 * dim, dim)
            layer(f"{at}attn.proj", dim, dim)
            layer(f"{at}mlp.fc1", mlp * dim, dim)
            layer(f"{at}mlp.fc2", dim, mlp * dim)
            if reduction > 1:
                layer(f"{at}attn.sr", dim, dim, reduction, reduction)
                layer(f"{at}attn.norm", dim)
        before = dim
    layer("norm", before)
    layer("head", classes, before)
    return shapes


@pytest.mark.parametrize(
    ("name", "depths", "millions", "gmacs"),
    [
        ("pvt_tiny", (2, 2, 2, 2), 13.2, 1.94),
        ("pvt_small", (3, 4, 6, 3), 24.5, 3.83),
        ("pvt_medium", (3, 4, 18, 3), 44.2, 6.7),
        ("pvt_large", (3, 8, 27, 3), 61.4, 9.8),
    ],
)
def test_keys_parameters_and_macs_are_the_published(name, depths, millions, gmacs):
    model = skeleton(name)
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert state == expected_shapes(depths)
    assert round(sum(each.numel() for each in model.parameters()) / 1e6, 1) == millions
    assert tomexport.plan(name, "none").macs / 1e9 == pytest.approx(gmacs, rel=0.02)


def test_every_name_is_in_the_registry():
    assert set(timm().list_models(module="pvt")) == set(VARIANTS)


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_the_network_equals_a_second_implementation(natural_images, size):
    model = small_pvt(img_size=size)
    image = torch.from_numpy(natural_images(96)[0, :, : size[0], : size[1]])
    with torch.no_grad():
        found = model(image[None])[0]
        reduced = tomexport.reduce(model, "none")(image[None])[0]
        expected = hybrids_by_hand.pvt(model.state_dict(), image, PVT_HEADS)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (reduced - found).abs().max() <= 2e-6 * found.abs().max()


def test_positions_follow_the_image_size(natural_images):
    model = small_pvt()
    image = torch.from_numpy(natural_images(96)[:1])
    reduced = tomexport.reduce(model, "none", img_size=(96, 96))
    state = reduced.net.state_dict()
    assert [state[f"pos_embed{i}"].shape[1] for i in (1, 2, 3, 4)] == [576, 144, 36, 10]
    with torch.no_grad():
        found = reduced(image)[0]
        expected = hybrids_by_hand.pvt(state, image[0], PVT_HEADS)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(state["pos_embed4"][:, 0], model.pos_embed4[:, 0])
    assert model.pos_embed1.shape[1] == 256, "the model that was given stays as it was"


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(RewriteError, match=r"32×32 pixels each, which 224×240 do not divide into"):
        skeleton("pvt_tiny", img_size=(224, 240))
