"""Published checkpoints of PVT and CvT."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter.methods.test_predictor import _predictors
from tomexport.errors import CheckpointError
from tomexport.exporter.architecture import build
from tomexport.exporter.checkpoint import Checkpoint
from tomexport.exporter.zoo import skeleton

NAMES = ["pvt_tiny", "pvt_small", "cvt_13", "cvt_21"]


def _state(name, **options):
    model = skeleton(name, **options)
    return {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}


def _build(state, arch=None, says=None):
    return build(Checkpoint("model.pth", state, says), arch)


@pytest.mark.parametrize("name", NAMES)
def test_found_by_shapes(name):
    key = "block3.1.attn.sr.weight" if name.startswith("pvt") else "stage1.blocks.1.mlp.fc1.bias"
    state = _state(name)
    state[key] += 1
    built = _build(state)
    assert built.names == (name,)
    assert bool((built.model.get_parameter(key) == 1).all())


@pytest.mark.parametrize(("name", "word"), [("pvt_tiny", "PVT_Tiny"), ("cvt_13", "CvT-13")])
def test_a_files_own_word_settles_it(name, word):
    assert _build(_state(name), says=word).names == (name,)


def test_classes_and_image_size_follow_the_weights():
    built = _build(_state("pvt_tiny", num_classes=7, img_size=384))
    assert built.model.img_size == (384, 384)
    assert built.model.head.out_features == 7
    built = _build(_state("cvt_13", num_classes=7))  # whose weights do not tell
    assert built.model.img_size == (224, 224)
    assert built.model.head.out_features == 7


def test_what_fits_no_name_is_described():
    with pytest.raises(CheckpointError, match=r"PVT of 2 \+ 2 \+ 2 \+ 1 blocks"):
        _build(_state("pvt_tiny", depths=(2, 2, 2, 1)))
    with pytest.raises(CheckpointError, match=r"CvT of 1 \+ 2 \+ 3 blocks, 64 \+ 192 \+ 384 cha"):
        _build(_state("cvt_13", depths=(1, 2, 3)))


def test_weights_of_another_kind_are_refused():
    with pytest.raises(CheckpointError, match="names its weights as PVT does"):
        _build(_state("pvt_tiny"), arch="cvt_13")
    with pytest.raises(CheckpointError, match="names its weights as CvT does"):
        _build(_state("cvt_13"), arch="pvt_tiny")


def test_a_file_with_predictors_is_of_dtps(tmp_path):
    path = tmp_path / "trained.pth"
    torch.save(_state("pvt_tiny") | _predictors(320, 1), path)
    plan = tomexport.reduce(path, "keep:0.5@5").plan
    assert (plan.method, plan.steps[5].tokens_out) == ("dtps", 98)
