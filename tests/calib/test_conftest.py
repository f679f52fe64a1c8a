"""The model that other tests rely on has learned something, and is what a user would have."""

from __future__ import annotations

from tomexport import pipeline
from tomexport.calib.evaluate import evaluate
from tomexport.calib.images import ImageSet


def test_it_has_learned(digits):
    assert digits.accuracy > 0.85


def test_its_pixels_are_those_of_its_preprocessing(digits, merged):
    report = evaluate(merged, ImageSet.find(digits.held_out), against=digits.checkpoint,
                      backends=["onnxruntime"])  # fmt: skip
    assert abs(report.reference_accuracy.top1.value - digits.accuracy) < 0.01
    assert pipeline.describe(merged).plan.steps[0].tokens_in == 65
