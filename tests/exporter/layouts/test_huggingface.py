"""Files of Hugging Face's transformers give what its own models give; see record_huggingface.py."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import tomexport
from tests.exporter.layouts.drawn import image_of, weights_of
from tomexport.errors import CheckpointError
from tomexport.exporter import architecture, zoo
from tomexport.exporter.checkpoint import Checkpoint, load_checkpoint
from tomexport.exporter.layouts import timm as timm_layout

RECORDED = json.loads(Path(__file__).with_name("huggingface.json").read_text())
NAMES = {
    "vit": "vit_base_patch16_224",
    "vit_features": "vit_base_patch16_224",
    "deit": "vit_base_patch16_224",
    "deit_teacher": "deit_base_distilled_patch16_224",
    "dinov2": "vit_base_patch14_dinov2",
    "dinov2_giant": "vit_giant_patch14_dinov2",
    "dinov2_registers": "vit_base_patch14_reg4_dinov2",
    "clip": "vit_base_patch32_clip_quickgelu_224",
    "clip_features": "vit_base_patch32_clip_quickgelu_224",
    "clip_classifier": "vit_base_patch32_clip_224",
    "siglip": "vit_base_patch16_siglip_224",
    "siglip_classifier": "vit_base_patch16_siglip_gap_224",
}


@pytest.fixture
def small(monkeypatch):
    """Make timm's models as small as the recorded ones."""
    skeleton = partial(zoo.skeleton, embed_dim=48, num_heads=3, depth=2)

    def build(name, **options):
        return skeleton(name, **({"depth": 2} | options))

    monkeypatch.setattr(architecture, "skeleton", build)
    monkeypatch.setattr(timm_layout, "skeleton", build)


def _checkpoint(case, index=0, **changes):
    shapes = RECORDED[case]["files"][index]["shapes"]
    fields = {"config": RECORDED[case]["config"]} | changes
    return Checkpoint("model.safetensors", weights_of(shapes), None, **fields)


def _difference(built, case, index=0):
    side = RECORDED[case]["config"].get("vision_config", RECORDED[case]["config"])["image_size"]
    expected = torch.tensor(RECORDED[case]["files"][index]["output"])
    with torch.no_grad():
        found = built.model(image_of(side))[0]
    assert expected.std() > 0.1, "an output without contrast shows nothing"
    return float((found - expected).abs().max())


@pytest.mark.parametrize("index", [0, 1], ids=["as written", "as held"])
@pytest.mark.parametrize("case", RECORDED)
def test_the_model_is_the_one_that_was_saved(small, case, index):
    built = architecture.build(_checkpoint(case, index), NAMES[case])
    assert _difference(built, case, index) < 1e-5
    assert any("as the config.json beside it says" in note for note in built.notes)


@pytest.mark.parametrize("case", ["vit", "deit_teacher", "clip", "siglip"])
def test_the_architecture_is_found_by_shapes(small, case):
    built = architecture.build(_checkpoint(case))
    assert NAMES[case] in built.names
    assert all(("quickgelu" in name) == (case == "clip") for name in built.names)
    assert _difference(built, case) < 1e-5
    tomexport.reduce(built.model, "const:2")


def test_what_the_tensors_do_not_tell_is_asked_for(small):
    with pytest.raises(CheckpointError, match=r"do not tell .* config\.json beside it, .*--arch"):
        architecture.build(_checkpoint("vit", config={}))
    built = architecture.build(_checkpoint("vit", config={}), NAMES["vit"])
    assert built.model.norm.eps == 1e-6
    assert "activation, epsilon and heads are those of vit_base_patch16_224" in built.notes[-1]


def test_the_config_decides_where_a_name_says_otherwise(small):
    config = RECORDED["vit"]["config"]
    assert architecture.build(_checkpoint("vit"), NAMES["vit"]).model.norm.eps == 1e-12
    other = config | {"hidden_act": "gelu_new", "num_attention_heads": 6}
    built = architecture.build(_checkpoint("vit", config=other), NAMES["vit"])
    assert built.model.blocks[0].attn.num_heads == 6
    assert _difference(built, "vit") > 1e-3
    (note,) = [note for note in built.notes if "config.json" in note]
    assert "6 heads" in note
    assert "GELU of approximate tanh" in note
    assert "eps 1e-12" in note


def test_what_a_config_leaves_out_is_its_kinds_own(small):
    bare = {"model_type": "siglip", "vision_config": {"num_attention_heads": 3}}
    assert _difference(architecture.build(_checkpoint("siglip", config=bare)), "siglip") < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "is of a model of type 'bert'"),
        ({"hidden_act": "mish"}, "asks for the activation 'mish'"),
        ({"num_attention_heads": 7}, "says 7 heads and an epsilon of 1e-12"),
        ({"num_attention_heads": "3"}, "says 3 heads"),
        ({"layer_norm_eps": 0}, "an epsilon of 0"),
    ],
)
def test_a_config_of_another_model_is_refused(small, changes, words):
    with pytest.raises(CheckpointError, match=words):
        architecture.build(_checkpoint("vit", config=RECORDED["vit"]["config"] | changes))


def test_parts_of_attention_that_do_not_go_together_are_named(small):
    checkpoint = _checkpoint("vit")
    key = "vit.encoder.layer.1.attention.attention.value.weight"
    checkpoint.state[key] = torch.zeros(48, 40)
    with pytest.raises(CheckpointError, match=r"\(48, 40\), so they are no parts of one layer"):
        architecture.build(checkpoint)
    del checkpoint.state[key]
    with pytest.raises(CheckpointError, match=r"have no blocks\.1\.attn\.v\.weight beside them"):
        architecture.build(checkpoint)


def test_two_vectors_side_by_side_are_no_pooling_of_ours(small):
    checkpoint = _checkpoint("dinov2")
    checkpoint.state["classifier.weight"] = torch.zeros(5, 96)
    with pytest.raises(CheckpointError, match="reads the class token and the mean"):
        architecture.build(checkpoint)


def test_the_text_tower_is_left_out(small):
    checkpoint = _checkpoint("clip")
    checkpoint.state["text_model.final_layer_norm.weight"] = torch.zeros(4)
    checkpoint.state["logit_scale"] = torch.zeros(())
    checkpoint.state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    built = architecture.build(checkpoint, NAMES["clip"])
    assert any("(the text tower)" in note for note in built.notes)
    assert _difference(built, "clip") < 1e-5


PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"height": 64, "width": 64}, "resample": 2}, (64, 1.0, "squash", "bilinear")),
        ({"size": 64, "resample": 3}, (64, 1.0, "squash", "bicubic")),
        ({"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}, "resample": 3},
         (64, 0.8, "center", "bicubic")),
    ],
)  # fmt: skip
def test_images_are_prepared_as_the_processor_beside_it_says(small, processor, expected):
    built = architecture.build(_checkpoint("vit", preprocessor=PROCESSOR | processor), NAMES["vit"])
    how = built.preprocessing
    found = (how["size"][0], how["crop_pct"], how["crop_mode"], how["interpolation"])
    assert found == expected
    assert (how["mean"], how["std"]) == ([0.5] * 3, [0.25] * 3)


@pytest.mark.parametrize("odd", [{}, PROCESSOR, PROCESSOR | {"size": 64, "do_normalize": False}])
def test_a_processor_that_does_not_say_leaves_the_names_own(small, odd):
    built = architecture.build(_checkpoint("vit", preprocessor=odd), NAMES["vit"])
    assert built.preprocessing == zoo.preprocessing(NAMES["vit"])


def test_both_files_beside_a_checkpoint_are_read(tmp_path):
    torch.save({"norm.weight": torch.ones(4)}, tmp_path / "mine.pth")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    read = load_checkpoint(tmp_path / "mine.pth")
    assert read.config == {"model_type": "vit"}
    assert read.preprocessor == {}
