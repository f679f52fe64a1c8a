"""State dicts of timm's modules: their names, image sizes and buffers are found again."""

from __future__ import annotations

import pytest
import torch

from tomexport.errors import CheckpointError, RewriteError
from tomexport.exporter.source import find
from tomexport.exporter.zoo import blocks_only, fill_buffers, skeleton

NARROW = {"embed_dim": 96, "num_heads": 3, "depth": 2}


def _saved(model, folder):
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    "name", ["test_vit_relpos", "eva02_tiny_patch14_336", "vit_tiny_r_s16_p8_224"]
)
def test_a_name_is_found_by_shapes_and_computes_the_same(tmp_path, seeded, name):
    model = seeded(name)
    found = find(_saved(model, tmp_path))
    assert found.names[0] == name
    image = torch.randn(
        1, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        assert torch.equal(found.model(image), model(image))


def test_a_name_can_be_given(tmp_path, seeded):
    model = seeded("vit_tiny_patch16_dinov3_qkvb")
    found = find(_saved(model, tmp_path), arch="vit_tiny_patch16_dinov3_qkvb")
    with torch.no_grad():
        image = torch.zeros(1, 3, 256, 256)
        assert torch.equal(found.model(image), model(image))


def test_tables_of_relative_positions_tell_the_image_size(tmp_path, seeded):
    model = seeded(
        "vit_relpos_small_patch16_224", rel_pos_type="bias", img_size=96, class_token=True
    )
    tables = [key for key in model.state_dict() if key.endswith("relative_position_bias_table")]
    assert model.state_dict()[tables[0]].shape[0] == 11**2 + 3
    from tomexport.exporter.layouts.timm import _side_of_distances

    other = seeded("vit_relpos_small_patch16_224", rel_pos_type="bias", class_token=True)
    assert _side_of_distances(other, model.state_dict()) == 6
    assert _side_of_distances(model, model.state_dict()) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_rope_mixed_224", NARROW),
        ("vit_small_patch16_dinov3", NARROW),
        ("vit_pe_core_small_patch16_384", NARROW),
        ("beit_base_patch16_224", NARROW),
        ("vit_relpos_base_patch16_cls_224", NARROW),
        ("vit_srelpos_small_patch16_224", NARROW | {"rel_pos_type": "bias"}),
        ("vit_small_resnet26d_224", NARROW),
        ("naflexvit_base_patch16_parfac_gap", NARROW),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_buffers_that_no_checkpoint_holds_are_computed(seeded, name, options):
    model = seeded(name, **options)
    built = skeleton(name, **options)
    built.load_state_dict(model.state_dict(), assign=True)
    fill_buffers(built)
    expected = dict(model.named_buffers())
    assert all(torch.equal(tensor, expected[key]) for key, tensor in built.named_buffers())
    assert not any(tensor.is_meta for tensor in built.state_dict().values())


def test_buffers_that_nothing_computes_are_refused():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("grid", torch.empty(2, device="meta"), persistent=False)

    with pytest.raises(RewriteError, match=r"Odd has buffers that its checkpoint lacks \(grid\)"):
        fill_buffers(Odd())


def test_a_state_dict_of_another_family_is_not_that_of_a_name(tmp_path, seeded):
    path = _saved(seeded("test_vit_relpos"), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit beit_base_patch16_224"):
        find(path, arch="beit_base_patch16_224")


@pytest.mark.parametrize("name", ["vit_5b_patch16_sapiens2", "vit_small_patch16_dinov3"])
def test_a_few_blocks_of_any_name_can_be_built(name):
    assert len(skeleton(name, **blocks_only(name, 2)).blocks) == 2
