"""Soft grouping: DTEM's merging as it is trained, where every decision has a gradient.

Source: Lee and Hong, "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision
Transformers", NeurIPS 2024 (github.com/movinghoon/DTEM); written from the paper.

All tokens stay. Each has a weight, the patches that it still stands for: what merges moves its
weight and its content, in part, to the tokens of B that it resembles most. Attention and pooling go
by the weights, so that a token which has given all away counts for nothing.

One thing is ours: tokens are split into A and B as they are where the model runs, so that at low
temperature the first merge is the exported one.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from tomexport.exporter.methods.dtem import DTEM
from tomexport.exporter.methods.method import Reduced, View
from tomexport.kernels.merge.reference import parities

N_NEAREST = 3  # tokens of B that a token of A can go to
SCORE_TEMPERATURE = EDGE_TEMPERATURE = 0.1
_TINY = 1e-12


def select(
    scores: Float[Tensor, "B A O"], r: int, temperature: float = EDGE_TEMPERATURE
) -> Float[Tensor, "B A O"]:
    """Select r edges of a bipartite graph softly, one after the other.

    Args:
        scores: the similarity of each token of A to each of B.
        r: edges to select.
        temperature: towards 0, each edge is selected whole: the best of the r best rows.

    Returns:
        How much of each token of A goes to each of B; a row sums to 1 at most, all rows to r or,
        where a row was selected more than once, to less.
    """
    nearest, columns = scores.topk(min(N_NEAREST, scores.shape[2]), dim=2)  # (B, A, k)
    logits = nearest / SCORE_TEMPERATURE
    chosen = torch.zeros_like(logits)
    for _ in range(r):
        p = (logits / temperature).flatten(1).softmax(dim=1).view_as(logits)
        chosen = chosen + p
        left = 1 - p.sum(dim=2, keepdim=True)
        logits = logits + left.clamp(min=_TINY).log()  # a row that was taken fades
    chosen = chosen / chosen.sum(dim=2, keepdim=True).clamp(min=1).detach()
    return torch.zeros_like(scores).scatter(2, columns, chosen)


def group(
    x: Float[Tensor, "B N C"], weight: Float[Tensor, "B N 1"], embedding: Float[Tensor, "B N F"],
    n: int, r: int, n_prefix: int, temperature: float = EDGE_TEMPERATURE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Merge r of the first n tokens softly.

    Args:
        x: all tokens.
        weight: the patches that each stands for.
        embedding: what tokens are compared by.
        n: tokens that take part, the prefix included; those behind them have been absorbed.
        r: tokens to merge.
        n_prefix: tokens at the front that stay as they are.
        temperature: see `select`.

    Returns:
        x and weight, (B, N, C) and (B, N, 1): of those that took part, the heaviest first.
    """
    first_a, first_b = parities(n_prefix)
    direction = embedding / embedding.norm(dim=2, keepdim=True).clamp(min=_TINY)
    scores = direction[:, first_a:n:2] @ direction[:, first_b:n:2].mT  # (B, A, O)
    goes = select(scores, r, temperature)
    a, b = x[:, first_a:n:2], x[:, first_b:n:2]
    weight_a, weight_b = weight[:, first_a:n:2], weight[:, first_b:n:2]
    joined = weight_b + goes.mT @ weight_a
    b = (weight_b * b + goes.mT @ (weight_a * a)) / joined
    left = _within(1 - goes.sum(dim=2, keepdim=True), 0, 1)
    weight_a = _within(weight_a * left, _TINY, None)  # its logarithm is taken
    x_merged, weight_merged = torch.cat([a, b], dim=1), torch.cat([weight_a, joined], dim=1)
    order = weight_merged.argsort(dim=1, descending=True, stable=True)  # (B, A + O, 1)
    x_merged = x_merged.gather(1, order.expand_as(x_merged))
    weight_merged = weight_merged.gather(1, order)
    return (
        torch.cat([x[:, :n_prefix], x_merged, x[:, n:]], dim=1),
        torch.cat([weight[:, :n_prefix], weight_merged, weight[:, n:]], dim=1),
    )


def _within(values: Tensor, low: float, high: float | None) -> Tensor:
    """Clip values, not their gradient."""
    return values + (values.clamp(low, high) - values).detach()


def _reduce(view: View) -> Reduced:
    normed = view.attended.normed
    assert view.weights is not None
    assert normed is not None
    embedding = view.weights(normed.detach())  # (B, N, F)
    step = view.step
    weight = view.size.expand(*view.x.shape[:2], 1)
    x, weight = group(view.x, weight, embedding, step.tokens_in, step.removed, view.n_prefix)
    return Reduced(x, weight, None, None)


SOFT = dataclasses.replace(DTEM, name="dtem, as it is trained", reduce=_reduce)
