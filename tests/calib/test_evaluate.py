"""What evaluate says of a trained model, beside figures made by hand."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

import tomexport
from tomexport import pipeline
from tomexport.calib import evaluate as module
from tomexport.calib.evaluate import Judge, evaluate
from tomexport.calib.fidelity import Estimate, Likeness
from tomexport.calib.images import ImageSet
from tomexport.calib.outputs import Engine, Outputs
from tomexport.errors import ArtifactError, BackendError, ImageError, VerifyError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(digits):
    return ImageSet.find(digits.held_out, limit=100)


def _unlabelled(images):
    return dataclasses.replace(images, labels=None)


def _logits(model, images, metadata):
    with torch.no_grad():
        return model(torch.from_numpy(images(metadata)[0])).numpy()


def test_figures_are_those_of_pytorch(digits, merged, images):
    report = evaluate(merged, images)
    reduced = tomexport.reduce(digits.model, "const:8")
    metadata = pipeline.describe(merged)
    own, original = (_logits(m, images, metadata) for m in (reduced, digits.model))
    labels = np.array(images.labels)
    names = [run.backend for run in report.runs]
    assert names[:2] == ["onnxruntime", "openvino"]
    for run in report.runs[:2]:
        assert run.precision == "f32"
        assert run.accuracy.top1.value == pytest.approx((own.argmax(1) == labels).mean())
        in_five = (np.argsort(-own, axis=1)[:, :5] == labels[:, None]).any(axis=1)
        assert run.accuracy.top5.value == pytest.approx(in_five.mean())
        agreement = (own.argmax(1) == original.argmax(1)).mean()
        assert run.likeness.top1.value == pytest.approx(agreement)
        change = (own.argmax(1) == labels).mean() - (original.argmax(1) == labels).mean()
        assert run.change.top1.value == pytest.approx(change)
        assert run.change.top1.low < run.change.top1.value < run.change.top1.high
    assert report.reference_accuracy.top1.value == (original.argmax(1) == labels).mean()
    assert report.reference.startswith("merged.none.onnx, onnxruntime f32")
    assert (report.n_labelled, report.skipped, report.passed) == (100, (), True)
    assert report.images == f"100 of 500 in {digits.held_out}"


def test_without_labels_it_is_likeness_alone(merged, images):
    report = evaluate(merged, _unlabelled(images), backends=["onnxruntime"])
    (run,) = report.runs
    assert run.accuracy is run.change is report.reference_accuracy is None
    assert 0.5 < run.likeness.top1.value <= 1
    assert 0 < run.likeness.kl.value < 1
    assert 0.5 < run.likeness.cosine.value < 1


def test_pytorch_and_the_unmerged_export_are_one_reference(digits, merged, images):
    by_file = evaluate(merged, images, backends=["onnxruntime"])
    by_torch = evaluate(
        merged, images, backends=["onnxruntime"], against=digits.checkpoint, arch="test_vit"
    )
    assert by_torch.reference == f"{digits.checkpoint}, PyTorch"
    found, expected = (r.runs[0].likeness for r in (by_torch, by_file))
    assert found.top1 == expected.top1
    assert found.kl.value == pytest.approx(expected.kl.value, rel=1e-3)


def test_the_unmerged_model_is_like_itself(merged, images):
    none = merged.with_name("merged.none.onnx")
    report = evaluate(none, images, baseline=none, backends=["openvino"], precisions=["f32"])
    (run,) = report.runs
    assert run.likeness.top1.value == 1
    assert run.likeness.kl.value == pytest.approx(0, abs=1e-9)
    assert run.change.top1.value == 0
    assert run.n_kept == 100  # the reference had computed them


def test_labels_alone_will_do(tmp_path, merged, images):
    alone = shutil.copy(merged, tmp_path / "alone.onnx")
    report = evaluate(alone, images, backends=["onnxruntime"])
    assert report.reference is None
    assert report.runs[0].likeness is None
    assert report.runs[0].accuracy.top1.value > 0.5


def test_limits(merged, images, monkeypatch):
    half = Likeness(Estimate(0.5, 0.4, 0.6, 100), None, Estimate(0.9, 0.8, 1, 100))
    monkeypatch.setattr(module, "likeness", lambda *_: half)
    report = evaluate(merged, images, backends=["onnxruntime"], min_top1=1, min_agreement=1)
    assert not report.passed
    assert [f.split(" is ")[0] for f in report.runs[0].failures] == [
        "top-1 accuracy", "top-1 agreement",
    ]  # fmt: skip
    assert evaluate(merged, images, backends=["onnxruntime"], min_top1=0.1).passed


def test_some_labels_are_missing(merged, images):
    some = dataclasses.replace(images, labels=(*images.labels[:60], *[None] * 40))
    report = evaluate(merged, some, backends=["onnxruntime"])
    assert report.n_labelled == 60
    assert report.runs[0].accuracy.top1.n == 60
    assert report.runs[0].likeness.top1.n == 100


def test_class_folders_must_be_as_many_as_classes(merged, images):
    report = evaluate(merged, dataclasses.replace(images, n_names=3), backends=["onnxruntime"])
    assert report.n_labelled == 0
    assert "3 names do not say which of the model's 10 classes is which" in report.notes[-1]


def test_features_have_no_classes(tmp_path, seeded, images):
    path = tmp_path / "model.onnx"
    for schedule, file in (("const:8", path), ("none", tmp_path / "model.none.onnx")):
        tomexport.export(seeded("test_vit", num_classes=0), schedule, file, verify=False)
    report = evaluate(path, images.take(range(4)), backends=["onnxruntime"])
    assert report.runs[0].likeness.top1 is None
    assert report.runs[0].likeness.cosine.value > 0
    assert "labels are left aside" in report.notes[-1]
    with pytest.raises(ArtifactError, match="--min-agreement goes with classes, and the file"):
        evaluate(path, images, min_agreement=0.5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"min_top1": 70}, ArtifactError, "--min-top1 70 is no share"),
        ({"precisions": ["f8"]}, BackendError, "cannot compute in 'f8'"),
        ({"baseline": "absent.onnx"}, BackendError, "There is no file absent.onnx"),
    ],
)
def test_what_cannot_be_is_refused(merged, images, options, error, words):
    with pytest.raises(error, match=words):
        evaluate(merged, images, **options)


def test_nothing_to_measure_by_is_refused(tmp_path, merged, images):
    alone = shutil.copy(merged, tmp_path / "alone.onnx")
    bare = _unlabelled(images)
    with pytest.raises(ArtifactError, match=r"There is nothing to measure .* by: no image"):
        evaluate(alone, bare)
    with pytest.raises(ArtifactError, match="--min-agreement needs the unmerged model to judge"):
        evaluate(alone, images, min_agreement=0.9)
    with pytest.raises(ArtifactError, match="--min-top1 needs labels, and no image has one"):
        evaluate(merged, bare, min_top1=0.9)


def test_images_that_change_meanwhile_are_refused():
    engine = Engine("a", {}, np.zeros)
    first, second = (Outputs(np.zeros((1, 3)), np.array([i]), (), 0) for i in range(2))
    with pytest.raises(ImageError, match="The images changed while they were read"):
        Judge("logits", None, None, None).run(engine, first, second)


def test_labels_beyond_the_classes_are_refused(merged, images):
    wrong = dataclasses.replace(images, labels=(*images.labels[:-1], 10))
    with pytest.raises(ImageError, match=r"is of class 10, and the model has 10, counted from 0"):
        evaluate(merged, wrong)


def test_another_model_is_no_baseline(tmp_path, merged, images, seeded):
    with pytest.raises(ArtifactError, match=r"cannot be the unmerged model of .*tokens removed"):
        evaluate(merged, images, baseline=merged)
    other = tmp_path / "other.onnx"
    tomexport.export(seeded("test_vit", img_size=128, num_classes=10), "none", other, verify=False)
    with pytest.raises(ArtifactError, match="its SHA-256 of the weights is"):
        evaluate(merged, images, baseline=other)
    weights = tmp_path / "other.pth"
    torch.save(seeded("test_vit", img_size=128, num_classes=10).state_dict(), weights)
    with pytest.raises(VerifyError, match="are not those that"):
        evaluate(merged, images, against=weights, arch="test_vit")
