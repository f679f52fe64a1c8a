"""Clips and spectrograms: what others' code computes, and the whole way to both runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tomexport
from tests.exporter.models import signals
from tomexport import pipeline
from tomexport.calib.images import ImageSet
from tomexport.errors import CheckpointError, ImageError, RewriteError
from tomexport.exporter import zoo
from tomexport.exporter.architecture import build
from tomexport.exporter.checkpoint import Checkpoint
from tomexport.exporter.layouts.ast import AST
from tomexport.exporter.layouts.videomae import VIDEOMAE

RECORDED = json.loads(Path(__file__).with_name("signals.json").read_text())
CASES = {
    "videomae": ("videomae_small", signals.CLIP, VIDEOMAE, signals.videomae, signals.clip),
    "ast": ("ast_tiny", signals.SPECTROGRAM, AST, signals.ast, signals.spectrogram),
}


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def model(case):
    name, options, layout, weights, _ = CASES[case]
    made = zoo.timm().create_model(name, depth=2, num_classes=signals.CLASSES, **options)
    made.load_state_dict(layout.rename(weights(), "model.pth"))
    return made.eval()


def test_logits_are_those_of_others_code(case, model):
    with torch.no_grad():
        found = model(CASES[case][4]())[0]
    expected = torch.tensor(RECORDED[case])
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("output", ["logits", "tokens"])
def test_nothing_removed_is_the_original(case, model, output):
    signal = CASES[case][4]()
    reduced = tomexport.reduce(model, "none", output_kind=output)
    with torch.no_grad():
        assert torch.allclose(reduced(signal), reduced.original(model, signal), atol=1e-5)


def test_pooled_tokens_count_by_their_size():
    """With the mean of merged tokens weighted, as many copies of one frame give one answer."""
    model = zoo.timm().create_model("videomae_small", depth=1, num_classes=3, **signals.CLIP).eval()
    reduced = tomexport.reduce(model, "list:4")
    tokens = tomexport.reduce(model, "list:4", output_kind="tokens")
    with torch.no_grad():
        pooled = model.head(model.fc_norm(tokens(signals.clip()).mean(dim=1)))
        assert torch.allclose(reduced(signals.clip()), pooled, atol=1e-5)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_exported_and_proven_in_every_runtime(tmp_path, case, model, suffix):
    path = tmp_path / f"m{suffix}"
    report = tomexport.export(model, "list:3,0", path)
    assert report.verify.passed
    assert {run.backend for run in report.verify.runs} >= {"openvino"}
    assert all(run.images == 8 for run in report.verify.runs)
    signal = CASES[case][4]().numpy()
    found = tomexport.load(path, precision="f32")(signal)
    with torch.no_grad():
        expected = tomexport.reduce(model, "list:3,0")(torch.from_numpy(signal))
    assert np.abs(found - expected.numpy()).max() < 1e-4
    assert pipeline.describe(path).input_shape == (1, *signal.shape[1:])


@pytest.mark.parametrize(
    ("name", "tokens", "gmacs"),
    # VideoMAE's own table says 57, 180 and 597 GFLOPs, products counted once; AST's is 12 blocks of
    # 12 C² N + 2 C N² and the embedding
    [
        ("videomae_small", 1568, 57.0),
        ("videomae_base", 1568, 180.0),
        ("videomae_large", 1568, 597.0),
        ("ast_base", 1214, 130.5),
    ],
)
def test_tokens_and_macs_are_those_of_the_papers(name, tokens, gmacs):
    plan = tomexport.plan(name, "none")
    assert plan.steps[0].tokens_in == tokens
    assert plan.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_videos_plan_is_tomes():
    plan = tomexport.plan("videomae_large", "const:65")
    assert [step.tokens_out for step in plan.steps][-2:] == [73, 37]
    assert plan.macs / 1e9 == pytest.approx(281, rel=0.01)


def test_the_authors_files_are_found_by_shapes():
    state = {key: torch.zeros(t.shape) for key, t in signals.ast(12, n_patches=1212).items()}
    state["v.head.weight"] = torch.zeros(1000, 192)
    built = build(Checkpoint("audioset.pth", {k: t.clone() for k, t in state.items()}, None))
    assert built.names == ("ast_tiny",)
    assert built.preprocessing["mean"] == [-4.2677393]
    assert any("unread.head.weight" in note for note in built.notes)
    state = {key: torch.zeros(t.shape) for key, t in signals.videomae(12).items()}
    built = build(Checkpoint("k400.pth", state, None))
    assert built.names == ("videomae_small",)
    assert built.model.head.out_features == signals.CLASSES
    assert float(built.model.positions.abs().max()) == 1.0


def test_weights_of_another_size_are_refused():
    with pytest.raises(CheckpointError, match="AST of width 192"):
        build(Checkpoint("a.pth", signals.ast(3), None))
    with pytest.raises(CheckpointError, match="VideoMAE of width 384"):
        build(Checkpoint("a.pth", signals.videomae(3), None))


def test_other_sizes():
    model = zoo.timm().create_model("ast_tiny", depth=1).eval()
    longer = tomexport.reduce(model, "none", img_size=(128, 2048))
    assert longer.input_shape == (1, 128, 2048)
    assert longer.plan.steps[0].tokens_in == 2 + 12 * 204
    clip = zoo.timm().create_model("videomae_small", depth=1, n_frames=4).eval()
    assert tomexport.reduce(clip, "none", img_size=(64, 96)).plan.steps[0].tokens_in == 2 * 4 * 6
    with pytest.raises(RewriteError, match="holds no patch of 16×16"):
        tomexport.reduce(model, "none", img_size=(8, 1024))
    with pytest.raises(RewriteError, match="which 3 frames of 224×224 do not divide into"):
        zoo.timm().create_model("videomae_small", depth=1, n_frames=3)


def test_methods_that_need_a_class_token_are_refused_for_clips():
    with pytest.raises(RewriteError, match="ranks tokens by what the class token attends to"):
        tomexport.reduce(
            zoo.timm().create_model("videomae_small", depth=2, **signals.CLIP), "const:1",
            method="topk",
        )  # fmt: skip


def test_image_files_are_no_clips(tmp_path, case, model):
    path = tmp_path / "m.onnx"
    tomexport.export(model, "none", path, verify=False)
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"images give 3|no pixels"):
        ImageSet.find(tmp_path)(pipeline.describe(path))
