"""Token merging (ToMe).

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023
(github.com/facebookresearch/ToMe); written from the paper.

Similarity is the cosine between keys averaged over the heads; up to half of the mergeable tokens
can go at a site. Register tokens, which the original does not know, are protected like the class
token.

The options are those of the paper's ablations (its Table 1): what is compared, how, how tokens are
combined, and into which two sets they are split. All but the first leave the fused operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tomexport.exporter.methods.matching import Matching, Sets, by_parity, match
from tomexport.exporter.methods.method import Choice, Method, Reduced, View, carry_out
from tomexport.kernels.merge.reference import margin, margin_of, parities
from tomexport.kernels.operators import MERGE
from tomexport.plan import TWO_SET

_OPTIONS = {
    "metric": ("k", "q", "v", "x-before", "x-after"),
    "similarity": ("cosine", "euclidean", "dot", "softmax"),
    "combine": ("weighted", "mean", "max", "keep"),
    "partition": ("alternating", "sequential", "random"),
}
_NEEDS = {"k": ("keys",), "q": ("queries",), "v": ("values",), "x-before": (), "x-after": ()}
_TINY = 1e-12


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


def _signal(view: View, metric: str) -> Tensor:
    """Return what tokens are compared by, (B, G, N, D)."""
    if metric in ("x-before", "x-after"):
        return (view.before if metric == "x-before" else view.x)[:, None]
    seen = view.attended
    signal = {"k": seen.keys, "q": seen.queries, "v": seen.values}[metric]
    assert signal is not None
    return signal


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = (each / each.norm(dim=2, keepdim=True).clamp(min=_TINY) for each in (a, b))
    return a @ b.mT


def _euclidean(a: Tensor, b: Tensor) -> Tensor:
    """The squared distance, negated: ranked as the distance is."""
    squares = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]
    nearness: Tensor = 2 * (a @ b.mT) - squares
    return nearness


def _softmax(a: Tensor, b: Tensor) -> Tensor:
    """What the token would attend to among those of B."""
    scores: Tensor = a @ b.mT * a.shape[2] ** -0.5
    return scores.softmax(dim=2)


_SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "euclidean": _euclidean,
    "dot": lambda a, b: a @ b.mT,
    "softmax": _softmax,
}


def _sets(view: View, partition: str) -> Sets:
    n, n_prefix = view.step.tokens_in, view.n_prefix
    even = by_parity(n, n_prefix)
    if partition == "alternating":
        return even
    order = np.arange(n_prefix, n)
    if partition == "random":  # drawn once for each number of tokens
        order = np.random.default_rng(n).permutation(order)
    return Sets(np.sort(order[: len(even.a)]), np.sort(order[len(even.a) :]))


def _reduce(view: View, metric: str, similarity: str, combine: str, partition: str) -> Reduced:
    signal = _signal(view, metric)
    if (similarity, combine, partition) == ("cosine", "weighted", "alternating"):
        return merge(view, signal)
    sets = _sets(view, partition)
    mean = signal.mean(dim=1)  # (B, N, D)
    a, b = (mean.index_select(1, torch.from_numpy(positions)) for positions in sets)
    scores = _SIMILARITIES[similarity](a, b)
    r, n_prefix = view.step.removed, view.n_prefix

    def how_close() -> Tensor:
        gap = margin_of(scores, r, ranks_kept=not (n_prefix or view.raster))
        return gap if similarity == "cosine" else gap / scores.abs().mean(dim=(1, 2))

    matching = match(scores, sets, r, n_prefix)
    left = carry_out(view, _combined(view, matching, combine)._replace(margin=how_close))
    if combine == "max":
        assert left.target is not None
        slots = left.target[:, :, None].expand(view.x.shape)
        left = left._replace(x=left.x.scatter_reduce(1, slots, view.x, "amax"))
    return left


def _combined(view: View, matching: Matching, combine: str) -> Choice:
    """Say what tokens count where they go; the largest values are found from the kept tokens."""
    if combine == "weighted":
        weight = view.size[:, :, 0]
    elif combine == "mean":
        weight = view.x.new_ones(1, view.step.tokens_in)
    else:
        weight = (~matching.goes).to(view.x.dtype)
    mean = combine in ("weighted", "mean")
    return Choice(matching.target, weight, mean, None, leads=~matching.goes)


def _tome(
    metric: str = "k", similarity: str = "cosine", combine: str = "weighted",
    partition: str = "alternating",
) -> Method:  # fmt: skip
    return Method(
        name="tome",
        needs=_NEEDS[metric],
        counting=TWO_SET,
        reduce=partial(
            _reduce, metric=metric, similarity=similarity, combine=combine, partition=partition
        ),
        options=_OPTIONS,
        configure=_tome,
    )


TOME = _tome()
