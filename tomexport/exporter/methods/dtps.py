"""dTPS: tokens are scored as in DynamicViT; those that go are squeezed into those that stay.

Source: Wei et al., "Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision
Transformers", CVPR 2023 (github.com/megvii-research/TPS-CVPR2023); written from the paper.
"""

from __future__ import annotations

from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.predictor import PREDICTED, predicted_score, predictors
from tomexport.exporter.methods.selection import squeeze_best


def _choose(view: View) -> Choice:
    return squeeze_best(view, predicted_score(view))


DTPS = Method(
    name="dtps",
    needs=(),
    counting=PREDICTED,
    reduce=by_choice(_choose),
    sizes=False,
    weights=predictors,
)
