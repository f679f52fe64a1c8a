"""SUPPORT.md is what the survey of all names gives today: right, or refused with a reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def survey():
    spec = importlib.util.spec_from_file_location("support", ROOT / "benchmarks" / "support.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_name_is_right_or_refused(survey):
    page = survey.page()
    assert page == survey.TARGET.read_text(), "run: python benchmarks/support.py"
    verdicts = [line.split("|")[3].strip() for line in page.splitlines() if line.startswith("| `")]
    assert len(verdicts) == 179
    assert verdicts.count("right") >= 150
    assert all(word == "right" or word.startswith("refused: ") for word in verdicts)


def test_a_wrong_number_would_be_seen(survey, monkeypatch):
    """The survey must be able to fail: a block without its LayerScale is told from a right one."""
    from tomexport.exporter.families import vit

    model = survey.small("deit3_small_patch16_224")
    assert survey.verdict(model) == "right"
    right = vit.VIT.mlp

    def without_scale(call, x):
        block = call.block
        return x + block.mlp(block.norm2(x))

    object.__setattr__(vit.VIT, "mlp", without_scale)
    try:
        assert survey.verdict(model).startswith("WRONG")
    finally:
        object.__setattr__(vit.VIT, "mlp", right)
