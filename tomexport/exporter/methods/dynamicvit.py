"""DynamicViT: before some blocks, a small network says which tokens are kept; the others go.

Source: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
NeurIPS 2021 (github.com/raoyongming/DynamicViT); written from the paper.

The kept tokens stand in the order of their scores, highest first.
"""

from __future__ import annotations

from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.predictor import PREDICTED, predicted_score, predictors
from tomexport.exporter.methods.selection import keep_best


def _choose(view: View) -> Choice:
    return keep_best(view, predicted_score(view))


DYNAMICVIT = Method(
    name="dynamicvit",
    needs=(),
    counting=PREDICTED,
    reduce=by_choice(_choose),
    sizes=False,
    drops=True,
    weights=predictors,
)
