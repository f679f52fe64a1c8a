"""Token merging (ToMe).

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023
(github.com/facebookresearch/ToMe); written from the paper.

Similarity is the cosine between keys averaged over the heads; up to half of the mergeable tokens
can go at a site. Register tokens, which the original does not know, are protected like the class
token.
"""

from __future__ import annotations

from torch import Tensor

from tomexport.exporter.families.family import Signals
from tomexport.exporter.methods.method import Method
from tomexport.kernels.operators import MERGE
from tomexport.plan import two_set_limit


def _keys(signals: Signals) -> Tensor:
    return signals.keys  # (B, H, N, D); the operator averages over the heads


TOME = Method(
    name="tome",
    needs=("keys",),
    limit=two_set_limit,
    signal=_keys,
    operator=MERGE,
)
