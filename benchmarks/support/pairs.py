"""Each method on each family, on one small model of it, in both runtimes.

A pair is right if ONNX Runtime and OpenVINO give what PyTorch gives, on a generated image with
natural statistics, to 1e-4 of the largest output, and if that is not what the model gives with
nothing removed. That PyTorch computes the method's rule is for the tests to show (`SHOWN_BY`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
import torch
from torch import nn

from benchmarks.support.names import (
    RIGHT,
    exported,
    image_for,
    in_onnxruntime,
    judged,
)
from tomexport import pipeline
from tomexport.errors import CheckpointError, PlanError, RewriteError
from tomexport.exporter.families import FAMILIES, family_of
from tomexport.exporter.methods import METHODS, method_of
from tomexport.exporter.methods.adaptive import ADAPTIVE
from tomexport.exporter.rewrite import ReducedModel
from tomexport.exporter.source import find
from tomexport.exporter.weights import seed_weights
from tomexport.exporter.zoo import timm
from tomexport.plan import Schedule

APPROXIMATE = "approximate"
_METHODS = "tests/exporter/methods/"
# the test that shows that PyTorch computes what the paper says
SHOWN_BY = {
    "tome": f"{_METHODS}test_tome.py::test_logits_equal_the_rule_by_hand",
    "dtem": f"{_METHODS}test_dtem.py::test_a_checkpoint_computes_what_the_rule_says",
    "pitome": f"{_METHODS}test_pitome.py::test_logits_equal_the_rule_by_hand",
    "tofu": f"{_METHODS}test_tofu.py::test_logits_equal_the_rule_by_hand",
    "diffrate": f"{_METHODS}test_diffrate.py::test_logits_equal_the_rule_by_hand",
    "evit": f"{_METHODS}test_selection.py::test_the_best_are_kept_as_by_hand",
    "dynamicvit": f"{_METHODS}test_predictor.py::test_a_checkpoint_computes_what_the_rule_says",
    "dtps": f"{_METHODS}test_predictor.py::test_a_checkpoint_computes_what_the_rule_says",
    "etps": f"{_METHODS}test_etps.py::test_the_others_join_the_kept_as_by_hand",
    "evo-vit": f"{_METHODS}test_evo_vit.py::test_a_checkpoint_computes_what_the_rule_says",
    "ats": f"{_METHODS}test_ats.py::test_the_most_significant_are_kept_as_by_hand",
    "topk": f"{_METHODS}test_selection.py::test_the_best_are_kept_as_by_hand",
    "random": f"{_METHODS}test_selection.py::test_random_keeps_the_same_tokens_of_every_image",
}
# the test that shows that a family hands methods what its attention computes
SIGNALS_SHOWN_BY = "tests/exporter/families/test_transformer.py::test_signals_equal_those_by_hand"
_NARROW = {"embed_dim": 192, "num_heads": 3, "depth": 3}
# family: (name, options) of a model with a class token, where there is one
REPRESENTATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "parallel": ("vit_small_patch16_18x2_224", _NARROW | {"img_size": 96}),
    "vit": ("deit_tiny_patch16_224", _NARROW | {"img_size": 96}),
    "eva": ("vit_small_patch16_dinov3", _NARROW | {"img_size": 96}),
    "beit": ("beit_base_patch16_224", _NARROW | {"img_size": 96}),
    "relpos": ("vit_relpos_base_patch16_cls_224", _NARROW | {"img_size": 96}),
    "naflex": ("naflexvit_base_patch16_radio_v3", _NARROW),
    "lvvit": ("lvvit_s", {"depth": 3, "img_size": 96}),
    "sret": ("sret_t", {"img_size": 64}),
    "pvt": ("pvt_tiny", {"img_size": 64}),
    "cvt": ("cvt_13", {"depths": (1, 2, 3), "img_size": 64}),
    "signal": ("ast_tiny", {"depth": 3, "img_size": (66, 66)}),
}
_KEEP = "keep:0.7@1,2"


@dataclass(frozen=True)
class Pair:
    """What is known of a method on a family.

    Attributes:
        verdict: right, approximate, or refused with the reason.
        sources: the hash of the code that was found so.
    """

    verdict: str
    sources: str


def methods() -> list[str]:
    """Return the names of all methods, those that are refused included."""
    return [*(method.name for method in METHODS), *ADAPTIVE]


def families() -> list[str]:
    """Return the names of all families."""
    return [family.name for family in FAMILIES]


def model_of(family: str) -> nn.Module:
    """Build the small model that stands for a family."""
    name, options = REPRESENTATIVES[family]
    model = seed_weights(timm().create_model(name, **options), 1).eval()
    if family == "naflex":  # which takes images of any size, and no argument that says so
        family_of(model).resize(model, (96, 96))
    return model


def verdict(model: nn.Module, name: str) -> str:
    """Compare PyTorch and both runtimes where a method removes a third, twice."""
    try:
        reduced = reduced_by(model, name)
    except (RewriteError, PlanError, CheckpointError) as err:
        return f"refused: {err}"
    image = image_for(reduced)
    with torch.no_grad():
        expected = reduced(torch.from_numpy(image)).numpy()
        before = model(torch.from_numpy(image)).numpy()
    if judged(before, expected) == RIGHT:
        return "WRONG: nothing is removed"
    content = exported(reduced, portable=True)
    for run in (in_onnxruntime, _in_openvino):
        if (found := judged(expected, run(content, image))) != RIGHT:
            return f"{found} in {run.__name__.rpartition('_')[2]}"
    return APPROXIMATE if method_of(name).counting.note else RIGHT


def reduced_by(model: nn.Module, name: str) -> ReducedModel:
    """Return a model as a method reduces it, with weights of the method's own drawn from a seed.

    Raises: RewriteError, PlanError or CheckpointError where it cannot be.
    """
    found = dataclasses.replace(find(model), seed=0)
    schedule = Schedule.parse(_diffrate(model) if name == "diffrate" else _KEEP)
    return pipeline._reduce(found, schedule, name, True, None)


def _diffrate(model: nn.Module) -> str:
    """Return a schedule that prunes one and merges a tenth, in every block but a stage's first."""
    steps = pipeline.plan(model, "none").steps
    left = [int(step.tokens_in * 0.9**step.call) for step in steps]
    pruned, merged = (",".join(str(n + more) for n in left) for more in (1, 0))
    return f"diffrate:{pruned}/{merged}"


def _in_openvino(content: bytes, image: np.ndarray) -> np.ndarray:
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return np.asarray(compiled([image])[0])
