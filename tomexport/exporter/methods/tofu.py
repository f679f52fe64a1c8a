"""ToFu: tokens are pruned in the first half of the blocks, and fused in the second.

Source: Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV
2024; written from the paper. No official code is published.

Tokens are matched as in ToMe. In early blocks, where the mean of two tokens is treated unlike any
token, only the one stays that another would have joined; later ones take the plain mean, made as
long as the longest of its tokens. There are no sizes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tomexport.exporter.methods.matching import by_parity, match
from tomexport.exporter.methods.method import Choice, Method, Reduced, View, carry_out
from tomexport.kernels.merge.reference import margin
from tomexport.plan import TWO_SET


def _reduce(view: View) -> Reduced:
    keys = view.attended.keys
    assert keys is not None
    step, n_prefix = view.step, view.n_prefix
    metric = keys.mean(dim=1)
    metric = metric / metric.norm(dim=2, keepdim=True)
    sets = by_parity(step.tokens_in, n_prefix)
    scores = metric[:, sets.a[0] :: 2] @ metric[:, sets.b[0] :: 2].mT
    matching = match(scores, sets, step.removed, n_prefix)
    early = 2 * view.call < view.n_calls
    how_close = partial(margin, keys, step.removed, n_prefix, view.raster)
    stays = ~matching.goes
    weight = stays.to(view.x.dtype) if early else view.x.new_ones(1, step.tokens_in)
    choice = Choice(matching.target, weight, True, how_close, leads=stays)
    left = carry_out(view, choice)
    return left if early else left._replace(x=_lengthened(view, left))


def _lengthened(view: View, left: Reduced) -> Tensor:
    """Make each mean as long as the longest of its tokens."""
    assert left.target is not None
    length = view.x.norm(dim=2, keepdim=True)  # (B, N, 1)
    own = left.x.norm(dim=2, keepdim=True)
    longest = own.new_zeros(own.shape).scatter_reduce(1, left.target[:, :, None], length, "amax")
    fused: Tensor = left.x * (longest / own)
    return fused


TOFU = Method(name="tofu", needs=("keys",), counting=TWO_SET, reduce=_reduce, sizes=False)
