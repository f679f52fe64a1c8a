"""`load`: what it takes, what it gives, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

import tomexport
from tomexport.errors import BackendError, UnknownNameError


@pytest.fixture
def image(natural_images):
    return natural_images(160)[:1]


@pytest.mark.parametrize(
    ("file", "backend", "expected"),
    [
        ("model.onnx", None, "onnxruntime"),
        ("model.onnx", "openvino", "openvino"),
        ("model.xml", None, "openvino"),
    ],
)
def test_backend_follows_the_suffix(files, image, file, backend, expected):
    model = tomexport.load(files / file, backend)
    assert model.backend == expected
    output = model(image)
    assert output.shape == (1, 1000)
    assert output.dtype == np.float32


def test_outputs_do_not_change_with_the_next_call(files, natural_images):
    for file in ("model.onnx", "model.xml"):
        model = tomexport.load(files / file, precision="f32")
        first = model(natural_images(160)[:1])
        kept = first.copy()
        model(natural_images(160)[1:2])
        assert (first == kept).all()


def test_precision_and_threads(files, image):
    model = tomexport.load(files / "model.xml", threads=1, precision="f32")
    assert model.precision == "f32"
    assert model(image).shape == (1, 1000)
    with pytest.raises(BackendError, match="0 threads"):
        tomexport.load(files / "model.xml", threads=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "TPU"}, "no device 'TPU' here; it has CPU"),
        ({"precision": "f8"}, "cannot compute in 'f8' here; it can in f32"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "cannot compute in 'bf16' here"),
        ({"backend": "openvino", "device": "NPU"}, "openvino has no device 'NPU' here"),
    ],
)
def test_what_is_absent_is_refused_with_what_there_is(files, options, message):
    with pytest.raises(BackendError, match=message):
        tomexport.load(files / "model.onnx", **options)


def test_unknown_backend(files):
    with pytest.raises(UnknownNameError, match="Did you mean 'onnxruntime'"):
        tomexport.load(files / "model.onnx", "onnxrutime")


def test_files_that_are_none(files, tmp_path):
    with pytest.raises(BackendError, match="There is no file"):
        tomexport.load(tmp_path / "absent.onnx")
    with pytest.raises(BackendError, match=r"no runtime reads the suffix '\.pt'"):
        tomexport.load(tmp_path / "model.pt")
    with pytest.raises(BackendError, match=r"onnxruntime does not read '\.xml'"):
        tomexport.load(files / "model.xml", "onnxruntime")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes((files / "model.onnx").read_bytes()[:1000])
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(BackendError, match=r"broken\.onnx"):
            tomexport.load(broken, backend)


def test_ir_without_its_weights(files, tmp_path):
    alone = tmp_path / "model.xml"
    alone.write_bytes((files / "model.xml").read_bytes())
    with pytest.raises(BackendError, match=r"there is no model\.bin"):
        tomexport.load(alone)
    whole = (files / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(whole[:1000])
    with pytest.raises(BackendError, match=r"model\.bin, hold 1000 of \d+ bytes. Copy both files"):
        tomexport.load(alone)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_images_of_another_shape_or_type_are_refused(files, image, backend):
    model = tomexport.load(files / "model.onnx", backend)
    with pytest.raises(BackendError, match="images are 2×3×160×160, the file takes 1×3×160×160"):
        model(np.repeat(image, 2, axis=0))
    with pytest.raises(BackendError, match=r"takes 1×3×160×160\. Resize them; they are batch"):
        model(image.transpose(0, 2, 3, 1))
    with pytest.raises(BackendError, match="images are 3×160×160"):
        model(image[0])
    with pytest.raises(BackendError, match="float64, the file takes float32"):
        model(image.astype(np.float64))
    assert np.isfinite(model(np.asfortranarray(image))).all()
