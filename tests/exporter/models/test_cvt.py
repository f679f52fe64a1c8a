"""CvT: the published sizes and keys, and the same output as a second implementation."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter import hybrids_by_hand
from tests.exporter.hybrids import CVT_HEADS, small_cvt
from tomexport.errors import RewriteError
from tomexport.exporter.models.cvt import VARIANTS
from tomexport.exporter.zoo import skeleton, timm

# float32 against float64, of the largest output
TOLERANCE = 1e-5


def expected_shapes(depths, widths=(64, 192, 384), classes=1000):
    """The keys of a published checkpoint, from its description."""
    shapes, before = {}, 3

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    for i, (depth, dim) in enumerate(zip(depths, widths, strict=True)):
        side = (3, 7)[i == 0]
        layer(f"stage{i}.patch_embed.proj", dim, before, side, side)
        layer(f"stage{i}.patch_embed.norm", dim)
        for j in range(depth):
            at = f"stage{i}.blocks.{j}."
            layer(f"{at}norm1", dim)
            layer(f"{at}norm2", dim)
            for part in "qkv":
                conv = f"{at}attn.conv_proj_{part}."
                shapes[f"{conv}conv.weight"] = (dim, 1, 3, 3)
                layer(f"{conv}bn", dim)
                shapes[f"{conv}bn.running_mean"] = shapes[f"{conv}bn.running_var"] = (dim,)
                shapes[f"{conv}bn.num_batches_tracked"] = ()
                layer(f"{at}attn.proj_{part}", dim, dim)
            layer(f"{at}attn.proj", dim, dim)
            layer(f"{at}mlp.fc1", 4 * dim, dim)
            layer(f"{at}mlp.fc2", dim, 4 * dim)
        before = dim
    shapes["stage2.cls_token"] = (1, 1, before)
    layer("norm", before)
    layer("head", classes, before)
    return shapes


@pytest.mark.parametrize(
    ("name", "depths", "millions", "gmacs"),
    [("cvt_13", (1, 2, 10), 20, 4.58), ("cvt_21", (1, 4, 16), 32, 7.1)],
)
def test_keys_parameters_and_macs_are_the_published(name, depths, millions, gmacs):
    model = skeleton(name)
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert state == expected_shapes(depths)
    assert round(sum(each.numel() for each in model.parameters()) / 1e6) == millions
    assert tomexport.plan(name, "none").macs / 1e9 == pytest.approx(gmacs, rel=0.02)


def test_every_name_is_in_the_registry():
    assert set(timm().list_models(module="cvt")) == set(VARIANTS)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])  # the latter has odd grids in the end
def test_the_network_equals_a_second_implementation(natural_images, size):
    model = small_cvt(img_size=size)
    image = torch.from_numpy(natural_images(96)[0, :, : size[0], : size[1]])
    with torch.no_grad():
        found = model(image[None])[0]
        reduced = tomexport.reduce(model, "none")(image[None])[0]
        expected = hybrids_by_hand.cvt(model.state_dict(), image, CVT_HEADS)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (reduced - found).abs().max() <= 2e-6 * found.abs().max()


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(RewriteError, match=r"16×16 pixels each, which 224×230 do not divide into"):
        skeleton("cvt_13", img_size=(224, 230))
