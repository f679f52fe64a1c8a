"""int8 files: what is int8 in them, what is not, and what is said of them."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import numpy as np
import onnx
import pytest
from torch import nn

import tomexport
from tests.optimized import optimized
from tomexport import pipeline
from tomexport.artifact import DOMAIN, Metadata
from tomexport.calib import evaluate
from tomexport.calib import quantize as module
from tomexport.calib.fidelity import Estimate, Likeness
from tomexport.calib.images import ImageSet
from tomexport.calib.quantize import quantize
from tomexport.calib.quantizers.calibration import Calibration
from tomexport.errors import (
    ArtifactError,
    BackendError,
    ExportError,
    ImageError,
    TomexportError,
)
from tomexport.runtime import baselines
from tomexport.runtime.load import BACKENDS
from tomexport.runtime.openvino_backend import OpenVino
from tomexport.runtime.timing import Interval

N_CALIBRATED = 24


@pytest.fixture(autouse=True)
def _small_and_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "N_JUDGED", 100)


@pytest.fixture(scope="module")
def images(digits):
    return ImageSet.find(digits.held_out)


@pytest.fixture(scope="module")
def portable(digits, tmp_path_factory):
    """The model with merging in standard operators, as OpenVINO's own files have it."""
    path = tmp_path_factory.mktemp("portable") / "merged.xml"
    tomexport.export(digits.model, "const:4", path, verify=False)
    return path


def _quantize(source, images, output, **options):
    return quantize(source, images, output, limit=N_CALIBRATED, timed=False, **options)


def _size_of_weights(path):
    return (path.with_suffix(".bin") if path.suffix == ".xml" else path).stat().st_size


def _int8_weights(path):
    model = onnx.load(path)
    return [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.INT8]


def test_onnx(tmp_path, merged, images):
    path = tmp_path / "int8.onnx"
    report = _quantize(merged, images, path)
    model = onnx.load(path)
    maker = {value: node.op_type for node in model.graph.node for value in node.output}
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    in_int8 = [n for n in products if maker.get(n.input[1]) == "DequantizeLinear"]
    n_merges = len(pipeline.describe(merged).decisions)
    # projection, the first of the MLP, qkv but where an eighth of the tokens or more merge by keys
    assert len(in_int8) == 3 * 6 + 1 - n_merges
    assert all(maker[n.input[0]] == "DequantizeLinear" for n in in_int8)
    others = [n for n in model.graph.node if n not in in_int8]
    assert not [
        n for n in others for value in n.input if maker.get(value) == "DequantizeLinear"
    ]  # fmt: skip
    assert sum(n.domain == DOMAIN for n in model.graph.node) == n_merges
    assert report.kept_float == 2 * n_merges
    assert len(model.functions) == len(onnx.load(merged).functions)
    assert report.files[str(path)] < 0.8 * report.size_before
    assert report.after.likeness.top1.value > 0.9
    assert report.after.change.top1.value > -0.08
    assert report.n_calibrated == N_CALIBRATED
    assert report.after.images == 100
    assert report.tool.startswith("onnxruntime 1.")
    kinds = optimized(path, tmp_path)
    assert kinds["MatMulIntegerToFloat"] == len(in_int8)  # what runs is int8 in fact
    assert not kinds["DequantizeLinear"]
    assert report.speed is None
    assert "top-1 (" in report.verdict


def test_openvino(tmp_path, portable, images):
    path = tmp_path / "int8.xml"
    report = _quantize(portable, images, path)
    graph = OpenVino().read(path)
    ours = [n for n in graph.get_ops() if DOMAIN in n.get_friendly_name()]
    assert ours
    assert not [n for n in ours if n.get_type_name() == "FakeQuantize"]
    fakes = [n for n in graph.get_ops() if n.get_type_name() == "FakeQuantize"]
    assert len(fakes) == 3 * 6 + 1  # as in ONNX Runtime
    assert "node_conv2d" not in {f.input_value(0).get_node().get_friendly_name() for f in fakes}
    readers = {r.get_node().get_friendly_name() for f in fakes
               for r in f.output(0).get_target_inputs()}  # fmt: skip
    assert not [name for name in readers if DOMAIN in name]
    assert _size_of_weights(path) < 0.7 * _size_of_weights(portable)
    assert report.after.likeness.top1.value > 0.9
    assert {run.backend for run in report.verify.runs} == {"openvino"}
    assert report.tool.startswith("nncf 3.")


def test_fused_kernels_run_in_int8_files(tmp_path, merged, images, fused):
    for name in ("int8.onnx", "int8.xml"):
        report = _quantize(merged, images, tmp_path / name)
        assert report.after.kernels
        assert report.after.likeness.top1.value > 0.9
        assert any(run.kernels for run in report.verify.runs)
        assert pipeline.describe(tmp_path / name).ops == "custom"


def test_without_kernels_our_nodes_cannot_become_ir(tmp_path, merged, images):
    with pytest.raises(ExportError, match=r"with nodes of our own .*--ops portable"):
        _quantize(merged, images, tmp_path / "int8.xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["evit", "dtem"])
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_other_methods(tmp_path, images, method, suffix):
    source = tmp_path / f"float{suffix}"
    tomexport.export("test_vit", "list:0,8,0,8,0,0", source, method=method, random_weights=0,
                     verify=False)  # fmt: skip
    report = _quantize(source, dataclasses.replace(images, labels=None), tmp_path / f"int8{suffix}")
    assert report.after.likeness.cosine.value > 0.9
    assert report.before is None
    assert "has the first class of float32 on" in report.verdict
    assert report.kept_float > 0  # what chooses, by attention or by an embedding


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_shared_weights_stay_one(tmp_path, seeded, images, suffix):
    model = copy.deepcopy(seeded("test_vit"))
    model.blocks = nn.Sequential(*(block for block in list(model.blocks)[:2] for _ in range(3)))
    model.pretrained_cfg = {}
    tomexport.export(model, "const:4", tmp_path / f"float{suffix}", verify=False)
    _quantize(tmp_path / f"float{suffix}", dataclasses.replace(images, labels=None),
              tmp_path / f"int8{suffix}")  # fmt: skip
    if suffix == ".xml":
        assert _size_of_weights(tmp_path / "int8.xml") < 0.7 * _size_of_weights(
            tmp_path / "float.xml"
        )
    else:
        weights = [w for w in _int8_weights(tmp_path / "int8.onnx") if len(w.dims) == 2]
        assert len(weights) == 2 * 3  # of two blocks, each called three times


def test_what_the_file_says_of_itself(tmp_path, merged, images):
    path = tmp_path / "int8.onnx"
    _quantize(merged, images, path)
    found, source = pipeline.describe(path), pipeline.describe(merged)
    assert dataclasses.replace(found, quantization=None) == source
    assert found.quantization["tool"] == "onnxruntime"
    assert found.quantization["images"] == N_CALIBRATED
    assert Metadata.from_json(found.to_json()) == found
    proof = tomexport.verify(path)
    assert proof.passed
    assert not any(run.gated for run in proof.runs)
    assert all(run.max_abs > 1e-3 for run in proof.runs)  # it is int8, and it is told
    with pytest.raises(ArtifactError, match="is int8 already"):
        _quantize(path, images, tmp_path / "again.onnx")


def test_baselines_are_quantized_alike(tmp_path, merged, images):
    path = tmp_path / "int8.onnx"
    report = _quantize(merged, images, path, with_baselines=True)
    assert [b.path for b in report.baselines] == [
        str(tmp_path / f"int8.{name}.onnx") for name in ("none", "bound")
    ]  # fmt: skip
    files = (path, *(tmp_path / f"int8.{name}.onnx" for name in ("none", "bound")))
    assert len({len(_int8_weights(file)) for file in files}) == 1  # the same products are float
    assert [b.kept_float for b in report.baselines] == [report.kept_float / 2] * 2
    found, missing = baselines.find(
        BACKENDS[0], path, pipeline.describe(path), {"none": None, "bound": None}
    )
    assert sorted(found) == ["bound", "none"]
    assert missing == []
    with pytest.raises(ArtifactError, match="its precision is float, and int8 is needed"):
        baselines.find(BACKENDS[0], path, pipeline.describe(path),
                       {"none": merged.with_name("merged.none.onnx")})  # fmt: skip
    (tmp_path / "int8.none.onnx").unlink()
    _, missing = baselines.find(BACKENDS[0], path, pipeline.describe(path), {"none": None})
    assert missing[-1] == "quantize --with-baselines writes what is missing"


def test_a_limit_that_is_missed_leaves_nothing(tmp_path, merged, images, monkeypatch):
    half = Likeness(Estimate(0.5, 0.4, 0.6, 100), None, Estimate(0.9, 0.8, 1, 100))
    monkeypatch.setattr(evaluate, "likeness", lambda *_: half)
    report = _quantize(merged, images, tmp_path / "int8.onnx", min_agreement=0.6)
    assert report.after.failures == ("top-1 agreement is 50.00%, the limit is 60.00%",)
    assert not report.passed
    assert report.files == {}
    assert not (tmp_path / "int8.onnx").exists()


def test_a_baseline_that_fails_leaves_nothing(tmp_path, merged, images):
    for name in ("model.onnx", "model.none.onnx", "model.bound.onnx"):
        shutil.copy(merged, tmp_path / name)
    whole = merged.read_bytes()
    (tmp_path / "model.bound.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TomexportError, match=r"model\.bound\.onnx"):
        _quantize(tmp_path / "model.onnx", images, tmp_path / "int8.onnx", with_baselines=True)
    assert list(tmp_path.glob("*int8*")) == []


def test_few_images_are_judged_on_themselves(tmp_path, merged, digits):
    few = ImageSet.find(digits.held_out, limit=30)
    report = _quantize(merged, few, tmp_path / "int8.onnx")
    assert report.after.images == 30
    assert "6 images beside those that it was calibrated on are too few" in report.notes[-1]
    assert report.judged.endswith(", those calibrated on among them")


def test_images_that_cannot_be_read_are_left_out(tmp_path, merged):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), "u1")
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    report = _quantize(merged, ImageSet.find(folder), tmp_path / "int8.onnx")
    assert report.n_calibrated == 7
    assert [each.name for each in report.skipped] == ["3.png"]


def test_calibration_in_batches_of_the_file(merged, images):
    four = dataclasses.replace(pipeline.describe(merged), input_shape=(4, 3, 128, 128))
    found = Calibration(images, tuple(range(10)), four)
    assert len(found) == 2
    assert [batch.shape for batch in found] == [(4, 3, 128, 128)] * 2
    expected, _ = images.take(range(4, 8))(four)
    assert np.array_equal(found[1], expected)


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("a.engine", {}, ExportError, "says no format"),
        ("a.onnx", {"limit": 0}, ImageError, "Calibrating on 0 images says nothing"),
        ("a.onnx", {"min_agreement": 99}, ArtifactError, "is no share"),
        ("merged.onnx", {}, ExportError, "would replace"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, merged, images, name, options, error, words):
    shutil.copy(merged, tmp_path / "merged.onnx")
    with pytest.raises(error, match=words):
        quantize(tmp_path / "merged.onnx", images, tmp_path / name, **options)


def test_files_that_do_not_fit_are_refused(tmp_path, merged, portable, images):
    with pytest.raises(ExportError, match=r"is made from an \.onnx, and merged\.xml is OpenVINO"):
        _quantize(portable, images, tmp_path / "int8.onnx")
    alone = shutil.copy(merged, tmp_path / "alone.onnx")
    with pytest.raises(BackendError, match="There is no file"):
        _quantize(alone, images, tmp_path / "int8.onnx", with_baselines=True)
    many = tmp_path / "many.onnx"
    tomexport.export("test_vit", "none", many, random_weights=0, batch=40, verify=False)
    with pytest.raises(ImageError, match="24 images do not fill one batch of 40"):
        _quantize(many, dataclasses.replace(images, labels=None), tmp_path / "int8.onnx")


def test_both_are_timed(tmp_path, merged, images, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.3)
    report = quantize(merged, images, tmp_path / "int8.onnx", limit=8)
    assert report.speed.before_ms > 0
    assert report.speed.speedup.low <= report.speed.speedup.value <= report.speed.speedup.high
    assert report.verdict.startswith("int8 is ")


@pytest.mark.parametrize(
    ("interval", "instructions", "words"),
    [
        ((1.3, 1.2, 1.4), (), "int8 is faster here, 1.30× (1.20–1.40), and has"),
        ((0.8, 0.7, 0.9), ("avx_vnni",), "int8 is slower here, 0.80× (0.70–0.90), and has"),
        ((0.8, 0.7, 0.9), (), "this CPU has no instructions for it, such as VNNI, and has"),
        ((1.0, 0.9, 1.1), (), "neither faster nor slower here that one could tell, 1.00×"),
    ],
)
def test_verdicts(tmp_path, merged, images, monkeypatch, interval, instructions, words):
    monkeypatch.setattr(module, "int8_instructions", lambda: instructions)
    monkeypatch.setattr(
        module, "_time", lambda *_: module.Speed(2.0, 1.0, "f32", "f32", Interval(*interval))
    )
    report = quantize(merged, dataclasses.replace(images, labels=None), tmp_path / "int8.onnx",
                      limit=8)  # fmt: skip
    assert words in report.verdict
