"""On digits, what is learned is nearer to the unmerged model than plain ToMe."""

from __future__ import annotations

import pytest

import tomexport
from tomexport.calib.images import ImageSet
from tomexport.calib.learn.learn import learn
from tomexport.calib.learn.train import Course


@pytest.fixture(scope="module")
def report(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "digits.safetensors"
    images = ImageSet.find(digits.train, limit=None)
    return learn(
        digits.checkpoint, images, out, schedule="const:13", judge=("const:16",), arch="test_vit",
        course=Course(epochs=2, lr=3e-3),
    )  # fmt: skip


@pytest.mark.parametrize("index", [0, 1], ids=["const:13", "const:16"])
def test_learning_helps(report, index):
    judged = report.judgements[index]
    assert judged.schedule == ("const:13", "const:16")[index]
    assert judged.verdict == "learning helps"
    assert judged.after.kl.value < 0.7 * judged.before.kl.value
    assert judged.after.top1.value > judged.before.top1.value
    assert judged.gmacs[0] < judged.gmacs[1] < judged.gmacs[2]
    unmerged, before, after = (each.value for each in judged.accuracy)
    assert unmerged > 0.9
    assert after > before


def test_what_was_learned_is_exported_and_proven(report, tmp_path):
    exported = tomexport.export(report.path, "const:13", tmp_path / "digits.onnx", arch="test_vit")
    assert exported.metadata.plan.method == "dtem"
    assert exported.verify.passed
    steps = exported.metadata.plan.steps
    assert tuple(step.tokens_out for step in steps) == report.judgements[0].counts
