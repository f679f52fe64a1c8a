"""What methods share that rank tokens and keep the best.

All of it is traced for export: static shapes, ties to the lower index.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from tomexport.exporter.gather import rows
from tomexport.exporter.methods.method import Choice, View
from tomexport.kernels.operators import RANK

NOWHERE = -1
_EPSILON = 1e-6


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
    rank, _ = RANK(score)
    others = n_prefix + n_kept if fuse else NOWHERE
    slot = torch.where(rank < n_kept, n_prefix + rank, others)
    weight = torch.where(rank < n_kept, 1.0, score)
    return Choice(
        target=torch.cat([torch.arange(n_prefix).expand(n_batch, -1), slot], dim=1),
        weight=torch.cat([score.new_ones(n_batch, n_prefix), weight], dim=1),
        mean=False,
        margin=partial(order_gap, score, n_kept),
    )


def squeeze_best(view: View, score: Tensor) -> Choice:
    """Keep the prefix and the tokens of the highest scores; each other joins the kept most like it.

    Alike is by the cosine of the tokens. One that joins weighs e to the cosine, and the kept one e,
    the weight of its like.

    Source: Wei et al., "Joint Token Pruning and Squeezing Towards More Aggressive Compression of
    Vision Transformers", CVPR 2023 (github.com/megvii-research/TPS-CVPR2023).

    Args:
        view: the site; its counts say how many are kept.
        score: (B, N − P).
    """
    n_prefix, n_batch = view.n_prefix, score.shape[0]
    n_kept = view.step.tokens_out - n_prefix
    rank, order = RANK(score)
    x = view.x[:, n_prefix:]
    ordered = rows(x / (x.norm(dim=2, keepdim=True) + _EPSILON), order)
    alike = ordered[:, n_kept:] @ ordered[:, :n_kept].mT  # (B, those that go, kept)
    stay = torch.arange(view.step.tokens_out).expand(n_batch, -1)
    slot = torch.cat([stay, n_prefix + alike.argmax(dim=2)], dim=1)
    weight = torch.cat([score.new_full((n_batch, n_prefix + n_kept), math.e),
                        alike.amax(dim=2).exp()], dim=1)  # fmt: skip
    place = torch.cat([stay[:, :n_prefix], n_prefix + rank], dim=1)  # in that order
    return Choice(
        target=slot.gather(1, place),
        weight=weight.gather(1, place),
        mean=True,
        margin=lambda: torch.minimum(order_gap(score, n_kept), host_gap(alike)),
        leads=place < view.step.tokens_out,
    )


def host_gap(alike: Tensor) -> Tensor:
    """Return by how much the nearest other host was less alike, (B,)."""
    if alike.shape[2] < 2:
        return alike.new_full((alike.shape[0],), torch.inf)
    best = alike.topk(2, dim=2).values
    return (best[:, :, 0] - best[:, :, 1]).amin(dim=1)


def order_gap(score: Tensor, n_kept: int) -> Tensor:
    """Return the smallest difference among the kept, whose order matters, and to the next, (B,).

    In units of the mean score, because scores of attention are as small as tokens are many.
    """
    ordered = score.sort(dim=1, descending=True).values[:, : n_kept + 1]
    if ordered.shape[1] < 2:
        return score.new_full((score.shape[0],), torch.inf)
    gaps = (ordered[:, :-1] - ordered[:, 1:]).amin(dim=1)
    return (gaps / score.abs().mean(dim=1)).nan_to_num(nan=0.0)
