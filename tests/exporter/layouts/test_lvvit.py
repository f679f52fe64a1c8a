"""Published LV-ViT checkpoints."""

from __future__ import annotations

import pytest
import torch

from tomexport.errors import CheckpointError
from tomexport.exporter.architecture import build
from tomexport.exporter.checkpoint import Checkpoint
from tomexport.exporter.zoo import skeleton


def _state(name="lvvit_s", **options):
    model = skeleton(name, **options)
    return {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}


def _build(state, arch=None, says=None):
    return build(Checkpoint("model.pth", state, says), arch)


@pytest.mark.parametrize("name", ["lvvit_s", "lvvit_m"])
def test_found_by_shapes(name):
    state = _state(name)
    state["blocks.3.mlp.fc1.weight"] += 1
    built = _build(state)
    assert built.names == (name,)
    assert bool((built.model.blocks[3].mlp.fc1.weight == 1).all())


def test_a_files_own_word_settles_it():
    assert _build(_state(), says="LV_ViT_S").names == ("lvvit_s",)


def test_classes_and_image_size_follow_the_weights():
    built = _build(_state(num_classes=7, img_size=384))
    assert built.model.img_size == (384, 384)
    assert built.model.aux_head.out_features == 7


def test_positions_of_no_square_are_refused():
    state = _state() | {"pos_embed": torch.zeros(1, 199, 384)}
    with pytest.raises(CheckpointError, match="LV-ViT of width 384, 16 blocks"):
        _build(state)
    with pytest.raises(CheckpointError, match="that is 198, which is no square grid"):
        _build(state, arch="lvvit_s")


def test_weights_of_another_kind_are_refused(seeded):
    with pytest.raises(CheckpointError, match="names its weights as LV-ViT does"):
        _build(_state(), arch="deit_small_patch16_224")
    with pytest.raises(CheckpointError, match="names its weights as timm does"):
        _build(dict(seeded("test_vit").state_dict()), arch="lvvit_s")
