"""Published SReT checkpoints: wrapped, prefixed, with and without their second names."""

from __future__ import annotations

import argparse

import pytest
import torch

from tomexport.errors import CheckpointError
from tomexport.exporter.architecture import build
from tomexport.exporter.checkpoint import Checkpoint, load_checkpoint


@pytest.fixture
def state(seeded):
    return dict(seeded("sret_t").state_dict())


def _build(state, arch="sret_t", says=None):
    return build(Checkpoint("model.pth", dict(state), says), arch)


def _equal(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_training_file_loads_key_for_key(state, tmp_path, wrapper, prefix):
    path = tmp_path / "SReT_T.pth"
    content = {prefix + key: tensor for key, tensor in state.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3, "args": argparse.Namespace(model="SReT_T")}
    torch.save(content, path)
    assert len(content if wrapper is None else content[wrapper]) == 510
    built = build(load_checkpoint(path), None if wrapper else "sret_t")
    assert built.names == ("sret_t",)
    _equal(built.model, state)
    assert built.model.transformers[0].blocks[0] is built.model.transformers[0].blocks[2]


@pytest.mark.parametrize("left_out", [0, 2])
def test_one_of_two_names_is_enough(state, left_out):
    def kept(key):
        parts = key.split(".")
        index = int(parts[3]) if parts[0] == "transformers" else 1
        return index % 2 or index % 4 != left_out

    fewer = {key: tensor for key, tensor in state.items() if kept(key)}
    assert len(fewer) == 350
    _equal(_build(fewer).model, state)


@pytest.mark.parametrize("key", ["transformers.0.blocks.2.mlp.fc1.weight",
                                 "transformers.2.blocks.8.coefficient3.bias"])  # fmt: skip
def test_two_names_that_disagree_are_refused(state, key):
    changed = state | {key: state[key] + 1e-6}
    with pytest.raises(CheckpointError, match=r"two names of one weight .* their values differ"):
        _build(changed)
    with pytest.raises(CheckpointError, match="two names of one weight"):
        _build(state | {key: state[key][:0]})


def test_the_variant_that_tensors_cannot_tell_is_asked_for(state):
    with pytest.raises(CheckpointError) as caught:
        _build(state, arch=None)
    message = str(caught.value)
    assert "sret_t = sret_t_distill; sret_t_wo_slice = sret_t_wo_slice_distill" in message
    assert "Name one with --arch" in message
    assert _build(state, "sret_t_wo_slice").model.slices == ((1, 1),) * 3


@pytest.mark.parametrize(
    ("word", "name"),
    [("SReT_T", "sret_t"), ("SReT_T_wo_slice", "sret_t_wo_slice"), ("SReT_T_distill",) * 2],
)
def test_a_files_own_word_settles_it(state, word, name):
    built = _build(state, arch=None, says=word)
    assert built.names == (name.lower(),)
    assert any("as the file says" in note for note in built.notes)


def test_classes_and_image_size_follow_the_weights(seeded):
    model = seeded("sret_t", num_classes=7, img_size=256)
    built = _build(model.state_dict())
    assert built.model.img_size == (256, 256)
    assert built.model.head.out_features == 7
    _equal(built.model, model.state_dict())


def test_positions_of_384_pixels_name_their_own_variant_first(seeded):
    model = seeded("sret_t_wo_slice_distill_384")
    with pytest.raises(CheckpointError, match="sret_t_wo_slice_distill_384 = sret_t_wo_slice"):
        _build(model.state_dict(), arch=None)


def test_weights_of_another_kind_are_refused(state, seeded):
    with pytest.raises(CheckpointError, match="names its weights as SReT does"):
        _build(state, arch="deit_tiny_patch16_224")
    with pytest.raises(CheckpointError, match="names its weights as timm does"):
        _build(seeded("test_vit").state_dict(), arch="sret_t")


def test_a_size_without_a_name_is_described(state):
    key = "transformers.0.blocks.0.mlp.fc1.weight"
    state[key] = state["transformers.0.blocks.2.mlp.fc1.weight"] = torch.zeros(99, 64)
    with pytest.raises(CheckpointError, match="64 channels after the stem, 99 in its first MLP"):
        _build(state, arch=None)
