"""`verify`: passes what is right, fails what is wrong, and can tell a near tie from an error."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tomexport
from tomexport import pipeline
from tomexport.calib.images import ImageSet
from tomexport.errors import ArtifactError, BackendError, VerifyError
from tomexport.kernels import build
from tomexport.runtime.backend import read_artifact
from tomexport.runtime.load import BACKENDS
from tomexport.runtime.onnxruntime_backend import _Session


@pytest.fixture(scope="module")
def golden(files):
    return read_artifact(BACKENDS[0], files / "model.onnx")[1]


@pytest.mark.parametrize("file", ["model.onnx", "model.xml"])
def test_a_right_file_passes_in_every_runtime(files, file):
    report = tomexport.verify(files / file)
    gated = [run for run in report.runs if run.gated]
    assert report.passed
    assert [run.backend for run in gated] == (
        ["onnxruntime", "openvino"] if file.endswith("onnx") else ["openvino"]
    )
    for run in gated:
        assert run.precision == "f32"
        assert run.images == 8
        assert run.max_abs < 1e-5
        assert run.top1 == 1
        assert run.decided_otherwise == 0
    assert 0 < report.fidelity.max_abs < 1
    assert report.to_dict()["passed"] is True


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_both_forms_are_gated_where_there_are_kernels(fused, files, backend):
    report = tomexport.verify(files / "model.onnx", backend=backend)
    gated = [run for run in report.runs if run.gated]
    assert [run.kernels for run in gated] == [True, False]
    assert [run.name for run in gated] == [f"{backend} f32 fused", f"{backend} f32 standard"]
    for run in gated:
        assert run.passed
        assert run.max_abs < 1e-5
        assert run.decided_otherwise == 0
    assert [entry["kernels"] for entry in report.to_dict()["runs"]] == [
        run.kernels for run in report.runs
    ]


def test_standard_operators_alone_where_there_are_none(files, tmp_path, monkeypatch):
    monkeypatch.delenv("TOMEXPORT_KERNELS")
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    report = tomexport.verify(files / "model.onnx")
    assert report.passed
    assert report.runs
    assert not any(run.kernels for run in report.runs)


def test_kernels_can_be_left_out_or_named(fused, files):
    path = files / "model.onnx"
    runs = tomexport.verify(path, backend="onnxruntime", kernels="off").runs
    assert [run.kernels for run in runs] == [False]
    library = build.library("onnxruntime", BACKENDS[0].version())
    runs = tomexport.verify(path, backend="onnxruntime", kernels=library).runs
    assert [run.kernels for run in runs] == [True, False]
    with pytest.raises(BackendError, match="There is no library nowhere"):
        tomexport.verify(files / "model.xml", kernels="nowhere")


def test_kernels_that_compute_something_else_fail(fused, files, monkeypatch):
    """The fused form is judged by itself: standard operators cannot cover for it."""
    run = _Session.run

    def slightly_off(session, images):
        output, *rest = run(session, images)
        return [output + 1e-2 * session.kernels, *rest]

    monkeypatch.setattr(_Session, "run", slightly_off)
    wrong, right = tomexport.verify(files / "model.onnx", backend="onnxruntime").runs
    assert (wrong.kernels, wrong.passed) == (True, False)
    assert (right.kernels, right.passed) == (False, True)


def test_lower_precisions_are_reported_not_gated(files):
    for run in tomexport.verify(files / "model.xml").runs:
        assert run.gated == (run.precision == "f32")
        assert run.gated or run.passed


def _alter(path, target, change):
    model = onnx.load(path)
    weight = next(w for w in model.graph.initializer if len(w.dims) == 2 and min(w.dims) > 60)
    values = numpy_helper.to_array(weight).copy()
    change(values)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, target)
    return target


def test_one_altered_weight_fails(files, tmp_path):
    def one(values):
        values[3, 5] += 0.5

    report = tomexport.verify(_alter(files / "model.onnx", tmp_path / "altered.onnx", one))
    assert not report.passed
    assert all(run.failures for run in report.runs if run.gated)


def test_a_weight_that_is_nan_fails(files, tmp_path):
    def one(values):
        values[0, 0] = np.nan

    assert not tomexport.verify(_alter(files / "model.onnx", tmp_path / "nan.onnx", one)).passed


def test_a_wrong_decision_fails_though_the_outputs_agree(files, golden):
    targets = [target.copy() for target in golden.targets]
    targets[0][2, [4, 6]] = targets[0][2, [6, 4]]
    wrong = dataclasses.replace(golden, targets=tuple(targets), margins=golden.margins + 1)
    (run,) = tomexport.verify(files / "model.onnx", backend="onnxruntime", golden=wrong).runs
    assert not run.passed
    assert run.decided_otherwise == 1
    assert run.near_ties == 0
    assert "1 of 8 images merged other tokens" in run.failures[0]


def test_a_near_tie_excuses_a_decision(files, golden):
    targets, margins = [t.copy() for t in golden.targets], golden.margins + 1
    targets[0][2, [4, 6]] = targets[0][2, [6, 4]]
    margins[0, 2] = 1e-6
    near = dataclasses.replace(golden, targets=tuple(targets), margins=margins)
    (run,) = tomexport.verify(files / "model.onnx", backend="onnxruntime", golden=near).runs
    assert run.passed
    assert (run.decided_otherwise, run.near_ties) == (1, 1)


def test_too_many_near_ties_leave_nothing_to_judge(files, golden):
    targets = [golden.targets[0][:, ::-1].copy(), *golden.targets[1:]]
    ties = dataclasses.replace(golden, targets=tuple(targets), margins=golden.margins * 0)
    (run,) = tomexport.verify(files / "model.onnx", backend="onnxruntime", golden=ties).runs
    assert not run.passed
    assert any("too few to judge" in failure for failure in run.failures)


@pytest.mark.parametrize("batch", [3, None])
def test_any_batch_is_compared_on_all_images(seeded, tmp_path, batch):
    path = tmp_path / "model.onnx"
    report = tomexport.export(seeded("test_vit"), "const:8", path, batch=batch)
    gated = [run for run in report.verify.runs if run.gated]
    assert all(run.images == 8 for run in gated)
    batches = {run.batch for run in gated}
    assert batches == ({3} if batch else {1, 3, 8})


def test_half_weights_pass_their_own_gate(seeded, tmp_path):
    full = tomexport.export(seeded("test_vit"), "const:8", tmp_path / "full.xml")
    half = tomexport.export(seeded("test_vit"), "const:8", tmp_path / "half.xml", half=True)
    sizes = [report.files[str(tmp_path / f"{n}.bin")] for n, report in
             (("full", full), ("half", half))]  # fmt: skip
    assert sizes[1] < 0.6 * sizes[0]
    assert half.verify.runs[0].max_abs > full.verify.runs[0].max_abs


def test_headless_models_have_no_top1(seeded, tmp_path):
    model = seeded("test_vit", num_classes=0)
    report = tomexport.export(model, "const:8", tmp_path / "model.onnx")
    assert report.metadata.output == "features"
    assert report.verify.runs[0].top1 is None
    assert report.verify.fidelity.top1 is None


def _photographs(folder, natural_images):
    from PIL import Image

    folder.mkdir()
    for index, image in enumerate(natural_images(200)):
        pixels = ((image.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return ImageSet.find(folder)


def test_against_pytorch_on_photographs(seeded, tmp_path, natural_images):
    import torch

    weights = tmp_path / "weights.pth"
    torch.save(seeded("deit_tiny_patch16_224").state_dict(), weights)
    path = tmp_path / "model.onnx"
    tomexport.export(weights, "linear:13", path, verify=False)
    images = _photographs(tmp_path / "photographs", natural_images)
    golden, what = pipeline.reference(path, weights, images)
    report = tomexport.verify(path, golden=golden, images=what)
    assert report.passed
    assert report.images == f"all of {tmp_path / 'photographs'}"
    assert report.runs[0].images == 4
    assert report.runs[0].max_abs < 1e-4


def test_against_drawn_weights_of_a_name(tmp_path):
    path = tmp_path / "model.onnx"
    tomexport.export("test_vit", "const:8", path, random_weights=7, verify=False)
    golden, _ = pipeline.reference(path, "test_vit")
    assert tomexport.verify(path, golden=golden, backend="onnxruntime").passed


def test_against_other_weights_is_refused(seeded, tmp_path, files):
    import torch

    other = tmp_path / "other.pth"
    torch.save(seeded("test_vit", seed=1).state_dict(), other)
    with pytest.raises(VerifyError, match="SHA-256"):
        pipeline.reference(files / "model.onnx", other, arch="test_vit")


def test_images_need_a_model(files):
    with pytest.raises(VerifyError, match="add --against MODEL"):
        pipeline.reference(files / "model.onnx", None)


def test_a_file_that_is_not_ours(tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match="carries no tomexport metadata"):
        tomexport.verify(tmp_path / "other.onnx")


def test_a_device_that_is_not_there(files):
    with pytest.raises(BackendError, match="no device 'GPU' here"):
        tomexport.verify(files / "model.xml", device="GPU")
