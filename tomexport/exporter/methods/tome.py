"""Token merging (ToMe).

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023
(github.com/facebookresearch/ToMe); written from the paper.

Similarity is the cosine between keys averaged over the heads; up to half of the mergeable tokens
can go at a site. Register tokens, which the original does not know, are protected like the class
token.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tomexport.exporter.methods.method import Method, Reduced, View
from tomexport.kernels.merge.reference import margin, parities
from tomexport.kernels.operators import MERGE
from tomexport.plan import TWO_SET


def merge(view: View, signal: Tensor) -> Reduced:
    """Merge by two-set matching on a signal (B, G, N, D), averaged over its groups."""
    step, n_prefix, raster = view.step, view.n_prefix, view.raster
    x, size, target = MERGE(
        view.x, view.size, signal, r=step.removed, n_prefix=n_prefix, raster=raster
    )
    leads = torch.zeros(step.tokens_in, dtype=torch.bool)
    leads[parities(n_prefix)[1] :: 2] = True  # what merges goes to a token of B
    how_close = partial(margin, signal, step.removed, n_prefix, raster)
    return Reduced(x, size, target, how_close, leads)


def _reduce(view: View) -> Reduced:
    return merge(view, view.attended.keys)  # (B, H, N, D)


TOME = Method(name="tome", needs=("keys",), counting=TWO_SET, reduce=_reduce)
