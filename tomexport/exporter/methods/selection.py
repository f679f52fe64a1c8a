"""What methods share that rank tokens and keep the best.

All of it is traced for export: static shapes, no sorting, ties to the lower index.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tomexport.exporter.methods.method import Choice, View

_NOWHERE = -1


def class_score(view: View) -> Tensor:
    """Return what the class token attends to, averaged over the heads, (B, N − P)."""
    attention = view.attended.class_attention
    assert attention is not None
    return attention().mean(dim=1)[:, view.n_prefix :]


def keep_best(view: View, score: Tensor, *, fuse: bool = False) -> Choice:
    """Keep the prefix and the tokens of the highest scores, highest first.

    Args:
        view: the site; its counts say how many are kept.
        score: (B, N − P).
        fuse: sum the others, weighted by their scores, into one more slot, the last; otherwise
            they go nowhere.
    """
    n_prefix, n_batch = view.n_prefix, score.shape[0]
    n_kept = view.step.tokens_out - n_prefix - fuse
    rank = ranks(score)
    others = n_prefix + n_kept if fuse else _NOWHERE
    slot = torch.where(rank < n_kept, n_prefix + rank, others)
    weight = torch.where(rank < n_kept, 1.0, score)
    return Choice(
        target=torch.cat([torch.arange(n_prefix).expand(n_batch, -1), slot], dim=1),
        weight=torch.cat([score.new_ones(n_batch, n_prefix), weight], dim=1),
        mean=False,
        margin=partial(order_gap, score, n_kept),
    )


def ranks(score: Tensor) -> Tensor:
    """Return how many tokens are ahead of each: higher score, or the same and a lower index.

    Comparisons and sums only: sorting keeps no order of ties in some runtimes.

    Args:
        score: (B, N).

    Returns: (B, N) int64, a permutation of 0 … N − 1 unless scores are NaN.
    """
    n = score.shape[1]
    mine, other = score[:, :, None], score[:, None, :]
    earlier = torch.ones(n, n, dtype=torch.bool).tril(-1)  # the other's index is lower
    ahead = (other > mine) | ((other == mine) & earlier)
    return ahead.int().sum(dim=2)


def order_gap(score: Tensor, n_kept: int) -> Tensor:
    """Return the smallest difference among the kept, whose order matters, and to the next, (B,).

    In units of the mean score, because scores of attention are as small as tokens are many.
    """
    ordered = score.sort(dim=1, descending=True).values[:, : n_kept + 1]
    if ordered.shape[1] < 2:
        return score.new_full((score.shape[0],), torch.inf)
    gaps = (ordered[:, :-1] - ordered[:, 1:]).amin(dim=1)
    return (gaps / score.abs().mean(dim=1)).nan_to_num(nan=0.0)
