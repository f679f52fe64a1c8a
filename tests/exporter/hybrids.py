"""Small PVTs and CvTs of all stages, and what they must compute when tokens go."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from tests.exporter import hybrids_by_hand
from tomexport import pipeline
from tomexport.exporter.models.cvt import CvT
from tomexport.exporter.models.cvt import Variant as CvTVariant
from tomexport.exporter.models.pvt import PVT
from tomexport.exporter.models.pvt import Variant as PVTVariant
from tomexport.exporter.rewrite import ReducedModel
from tomexport.exporter.source import Source, find
from tomexport.exporter.weights import seed_weights
from tomexport.plan import Schedule

PVT_HEADS, CVT_HEADS = (1, 2, 5, 4), (1, 2, 3)


def small_pvt(seed=1, **options: Any) -> PVT:
    """Blocks 1, 2, 1, 2; at 64 pixels 256, 64, 16 and 1 + 4 tokens."""
    variant = PVTVariant((1, 2, 1, 2), (16, 32, 40, 64), PVT_HEADS, (2, 2, 2, 2))
    options = {"num_classes": 10, "img_size": 64} | options
    return seed_weights(PVT(variant, **options), seed).eval()


def small_cvt(seed=1, **options: Any) -> CvT:
    """Blocks 1, 1, 3; at 64 pixels 256, 64 and 1 + 16 tokens."""
    variant = CvTVariant((1, 1, 3), (16, 32, 48), CVT_HEADS)
    options = {"num_classes": 10, "img_size": 64} | options
    return seed_weights(CvT(variant, **options), seed).eval()


def source(model) -> Source:
    """With weights of a method's own drawn from a seed."""
    return dataclasses.replace(find(model), seed=0)


def reduced_by(model, schedule: str, method: str, output=None) -> ReducedModel:
    """Reduce a model with weights of the method's own drawn from a seed."""
    return pipeline._reduce(source(model), Schedule.parse(schedule), method, True, output)


def by_hand(model, reduced: ReducedModel, image, heads):
    """Compute a reduced model's logits by hand, its predictors' scores in float64."""
    own = {int(call): copy.deepcopy(each).double() for call, each in reduced.own.items()}
    steps = enumerate(reduced.plan.steps)
    kept = {i: step.tokens_out - step.n_prefix for i, step in steps if step.removed}
    network = getattr(hybrids_by_hand, type(model).__name__.lower())
    with torch.no_grad():
        return network(
            model.state_dict(), image, heads, kept, lambda call, x: own[call](x[None])[0].tolist()
        )
