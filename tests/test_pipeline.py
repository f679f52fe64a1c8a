"""The Python interface from end to end, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util

import numpy as np
import onnx
import pytest
import torch

import tomexport
from tomexport import pipeline
from tomexport.errors import (
    BackendError,
    CheckpointError,
    ExportError,
    MissingExtraError,
    RewriteError,
    UnknownNameError,
    VerifyError,
)
from tomexport.exporter import to_onnx, zoo
from tomexport.exporter.methods.tome import TOME
from tomexport.exporter.rewrite import ReducedModel
from tomexport.runtime import verify as verification
from tomexport.runtime.load import BACKENDS


@pytest.mark.parametrize(
    ("name", "schedule", "gmacs", "unreduced"),
    [
        ("deit_small_patch16_224", "const:13", 2.70, 4.60),
        ("vit_large_patch16_224", "const:8", 30.96, 61.60),
        ("vit_huge_patch14_224", "const:7", 92.83, 167.40),
    ],
)
def test_macs_are_those_of_the_papers(name, schedule, gmacs, unreduced):
    plan = tomexport.plan(name, schedule)
    assert plan.macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert plan.macs_unreduced / 1e9 == pytest.approx(unreduced, rel=0.01)


def test_macs_of_linear_layers_equal_a_count_by_hooks(seeded):
    """What the plan adds up is what really runs: counted by hooks on the reduced module."""
    model = seeded("test_vit4")  # registers, LayerScale, average pooling
    reduced = tomexport.reduce(model, "const:6")
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        if isinstance(module, torch.nn.Linear):
            counted += module.in_features * output.numel()
        elif isinstance(module, torch.nn.Conv2d):
            counted += module.weight[0].numel() * output.numel()

    for module in reduced.net.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        reduced(torch.zeros(1, *reduced.input_shape))
    products = sum(2 * step.tokens_in**2 * model.embed_dim for step in reduced.plan.steps)
    assert reduced.plan.macs == counted + products


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_what_a_file_says_of_itself(tmp_path, seeded, suffix):
    weights = tmp_path / "weights.pth"
    torch.save(seeded("deit_tiny_patch16_224", depth=12).state_dict(), weights)
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(weights, "const:16", path, verify=False)
    metadata = pipeline.describe(path)
    assert metadata == report.metadata
    assert metadata.plan == tomexport.plan("vit_tiny_patch16_224", "const:16")
    # those of this image size first; the last fits too, once its positions are those of the file
    same = ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_tiny_patch16_384")
    assert metadata.names == same
    assert metadata.preprocessing is None
    assert metadata.candidates["deit_tiny_patch16_224"]["mean"] == [0.485, 0.456, 0.406]
    assert metadata.candidates["vit_tiny_patch16_224"]["mean"] == [0.5, 0.5, 0.5]
    assert metadata.weights == "weights.pth"
    assert len(metadata.weights_sha256) == 64
    assert metadata.input_shape == (1, 3, 224, 224)
    assert set(metadata.versions) >= {"tomexport", "torch", "timm", "onnx"}
    assert any("16 → 10" in note for note in report.notes)


def test_preprocessing_has_the_size_of_the_weights(tmp_path, seeded):
    path = tmp_path / "model.onnx"
    model = seeded("test_vit")
    tomexport.export(model, "const:2", path, img_size=(96, 128), verify=False)
    metadata = pipeline.describe(path)
    assert metadata.preprocessing["size"] == [96, 128]
    assert metadata.input_shape == (1, 3, 96, 128)
    output = tomexport.load(path)(np.zeros((1, 3, 96, 128), np.float32))
    assert output.shape == (1, 1000)


def test_a_failing_file_does_not_appear(tmp_path, seeded, monkeypatch):
    strict = dataclasses.replace(verification._EXACT, max_abs=1e-12)
    monkeypatch.setattr(verification, "_EXACT", strict)
    path = tmp_path / "model.onnx"
    with pytest.raises(VerifyError, match="does not compute what PyTorch computes") as caught:
        tomexport.export(seeded("test_vit"), "const:8", path)
    assert not caught.value.report.passed
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(VerifyError, match="The file was kept"):
        tomexport.export(seeded("test_vit"), "const:8", path, keep=True)
    assert path.exists()


def test_images_of_the_user_are_compared_as_well(tmp_path, seeded, natural_images):
    def photographs(metadata):
        return natural_images(metadata.input_shape[2]), "four photographs"

    report = tomexport.export(
        seeded("test_vit"), "const:8", tmp_path / "model.onnx", images=photographs
    )
    assert report.verify.images == "four photographs"
    assert report.verify.runs[0].images == 4
    assert report.verify.passed


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0}, ExportError, "A batch of 0 holds no image"),
        ({"opset": 17}, ExportError, "Opset 17 is not supported; use 18 to 23"),
        ({"opset": 99}, ExportError, "Opset 99 is not supported"),
        ({"ops": "standard"}, UnknownNameError, "Unknown ops 'standard'; known: custom, portable"),
        ({"half": True}, ExportError, r"--half stores the weights of an \.xml as float16"),
        ({"method": "tomee"}, UnknownNameError, "Did you mean 'tome'"),
        ({"arch": "test_vit"}, RewriteError, "arch and random_weights go with a file or a name"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, seeded, options, error, message):
    with pytest.raises(error, match=message):
        tomexport.export(seeded("test_vit"), "const:8", tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_ir_with_nodes_of_our_own_is_refused_without_kernels(tmp_path, seeded, monkeypatch):
    wanted = r"model\.xml with nodes of our own can be written, and read, only with fused kernels"
    model, path = seeded("test_vit"), tmp_path / "model.xml"
    with pytest.raises(ExportError, match=f"{wanted}.*Fused kernels are off.*--ops portable"):
        tomexport.export(model, "const:8", path, ops="custom")
    monkeypatch.delenv("TOMEXPORT_KERNELS")
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExportError, match=f"{wanted}.*for want of"):
        tomexport.export(model, "const:8", path, ops="custom")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_gives_nan_is_refused(tmp_path, seeded):
    model = copy.deepcopy(seeded("test_vit"))
    with torch.no_grad():
        model.norm.weight[0] = torch.inf
    with pytest.raises(RewriteError, match="gives values that are not finite"):
        tomexport.export(model, "const:8", tmp_path / "model.onnx")


def test_a_signal_that_the_family_does_not_give(seeded):
    method = dataclasses.replace(TOME, name="other", needs=("class_attention",))
    plan = tomexport.plan(seeded("sret_t"), "const:8")
    with pytest.raises(RewriteError, match="other needs class_attention, which the family 'sret'"):
        ReducedModel(seeded("sret_t"), plan, method)


def test_a_model_that_pytorch_cannot_trace(tmp_path, seeded, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no way. Long story")

    monkeypatch.setattr(to_onnx.torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"could not export this model to ONNX: .*no way"):
        tomexport.export(seeded("test_vit"), "const:8", tmp_path / "model.onnx")
    monkeypatch.setattr(to_onnx.torch.onnx, "export", lambda *args, **kwargs: None)
    with pytest.raises(ExportError, match="returned no ONNX program"):
        tomexport.export(seeded("test_vit"), "const:8", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_names_without_weights_and_tags(monkeypatch):
    with pytest.raises(UnknownNameError, match="has no pretrained tag 'fb_in1'"):
        tomexport.plan("deit_tiny_patch16_224.fb_in1", "none")
    monkeypatch.setattr(zoo.timm(), "get_pretrained_cfg", lambda name: None)
    with pytest.raises(CheckpointError, match="timm has no pretrained weights for vit_tiny_patch"):
        zoo.pretrained("vit_tiny_patch16_224")


def test_pretrained_weights_that_do_not_load(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("connection lost")

    monkeypatch.setattr(zoo, "_is_cached", lambda hub_id: True)
    monkeypatch.setattr(zoo.timm(), "create_model", fail)
    with pytest.raises(CheckpointError, match="could not be loaded: connection lost"):
        zoo.pretrained("deit_tiny_patch16_224")


def test_a_file_without_its_golden_set(tmp_path, seeded):
    path = tmp_path / "model.onnx"
    tomexport.export(seeded("test_vit"), "none", path, verify=False)
    model = onnx.load(path)
    kept = [prop for prop in model.metadata_props if not prop.key.endswith("golden")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, path)
    with pytest.raises(tomexport.errors.ArtifactError, match="carries no golden set"):
        tomexport.verify(path)


def test_verifying_without_a_runtime(tmp_path, seeded, monkeypatch):
    path = tmp_path / "model.onnx"
    tomexport.export(seeded("test_vit"), "none", path, verify=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="needs a runtime, and none is installed"):
        tomexport.verify(path)


def test_a_provider_that_does_not_start_is_no_silent_fallback(tmp_path, seeded, monkeypatch):
    import onnxruntime

    path = tmp_path / "model.onnx"
    tomexport.export(seeded("test_vit"), "none", path, verify=False)
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"]
    )
    with pytest.raises(BackendError, match="could not start it, and fell back to Other"):
        tomexport.load(path)


def test_a_graph_that_a_runtime_cannot_compile(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    node = onnx.helper.make_node("Nothing", ["x"], ["y"], domain="nowhere")
    values = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    imports = [onnx.helper.make_opsetid("nowhere", 1), onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    with pytest.raises(BackendError, match="ONNX Runtime cannot load"):
        tomexport.load(path, "onnxruntime")
    with pytest.raises(BackendError, match=r"OpenVINO cannot (read|compile)"):
        tomexport.load(path, "openvino")


def test_ir_that_openvino_cannot_write(tmp_path, seeded, monkeypatch):
    import openvino

    def fail(*args, **kwargs):
        raise RuntimeError("no space")

    monkeypatch.setattr(openvino, "save_model", fail)
    with pytest.raises(ExportError, match=r"OpenVINO could not write model\.xml"):
        tomexport.export(seeded("test_vit"), "none", tmp_path / "model.xml", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_every_backend_has_a_name_of_its_own():
    assert len({backend.name for backend in BACKENDS}) == len(BACKENDS)


def test_baselines_are_written_beside_the_file_and_found_by_profile(seeded, tmp_path):
    report = tomexport.export(
        seeded("test_vit"), "const:8", tmp_path / "m.onnx", verify=False, with_baselines=True
    )
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.none.onnx", "m.bound.onnx"}
    none, bound = (r.metadata.plan for r in report.baselines)
    assert none.removed_total == 0
    assert [s.removed for s in bound.steps] == [s.removed for s in report.metadata.plan.steps]
    assert bound.method == "bound:tome"
    assert not report.baselines[1].metadata.decisions
    graph = onnx.load(tmp_path / "m.bound.onnx")
    assert not graph.functions
    assert all(node.domain == "" for node in graph.graph.node)


def test_a_baseline_that_is_there_stops_the_export_before_any_work(seeded, tmp_path):
    (tmp_path / "m.none.onnx").write_text("mine")
    with pytest.raises(ExportError, match=r"m\.none\.onnx exists already"):
        tomexport.export(
            seeded("test_vit"), "const:8", tmp_path / "m.onnx", verify=False, with_baselines=True
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m.none.onnx"]


@pytest.mark.parametrize(
    ("name", "schedule", "method", "suffix"),
    [
        ("test_vit", "const:8", None, ".onnx"),
        ("test_vit", "keep:0.6@2,4", "evo-vit", ".xml"),
        ("sret_t", "exp:0.25,0", None, ".onnx"),
    ],
)
def test_files_that_put_out_tokens_are_proven(
    tmp_path, seeded, natural_images, name, schedule, method, suffix
):
    path, model = tmp_path / f"m{suffix}", seeded(name)
    report = tomexport.export(model, schedule, path, method=method, output_kind="tokens")
    assert report.verify.passed
    assert {run.backend for run in report.verify.runs} >= {"openvino"}
    assert {(run.images, run.top1) for run in report.verify.runs} == {(2, None)}
    assert pipeline.describe(path).output == "tokens"
    reduced = tomexport.reduce(model, schedule, method=method, output_kind="tokens")
    image = natural_images(reduced.input_shape[1])[:1]
    with torch.no_grad():
        expected = reduced(torch.from_numpy(image)).numpy()
    found = tomexport.load(path, precision="f32")(image)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_wrong_tokens_are_seen(tmp_path, seeded):
    path = tmp_path / "m.onnx"
    tomexport.export(seeded("test_vit"), "const:8", path, output_kind="tokens", verify=False)
    golden, _ = pipeline.reference(path, seeded("test_vit"))
    assert golden.reduced.shape == (2, 100, 64)
    assert tomexport.verify(path, golden=golden, backend="onnxruntime").passed
    moved = dataclasses.replace(golden, reduced=np.roll(golden.reduced, 1, axis=1))
    assert not tomexport.verify(path, golden=moved, backend="onnxruntime").passed


def test_an_output_that_there_is_not_is_refused(tmp_path, seeded):
    with pytest.raises(UnknownNameError, match=r"Unknown output 'model\.onnx'; known: features"):
        tomexport.plan(seeded("test_vit"), "none", output_kind="model.onnx")
    with pytest.raises(RewriteError, match="test_vit puts out logits, not features"):
        tomexport.reduce(seeded("test_vit"), "none", output_kind="features")
    assert tomexport.reduce(seeded("test_vit"), "none", output_kind="logits").output == "logits"
