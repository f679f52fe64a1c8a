"""PiToMe: tokens in large clusters of alike ones merge first, those that stand alone stay.

Source: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS
2024 (github.com/hchautran/PiToMe); written from the paper.

A token's energy is how like it is to all, by the cosine of the keys averaged over the heads, above
a margin that falls from block to block. In the last half of the blocks the 2r tokens of the highest
energy are split by turns into those that go and those they go to. Before, all tokens are split so,
and the r best pairs merge, as in ToMe. Attention is not weighted by sizes, as published.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tomexport.exporter.gather import rows
from tomexport.exporter.methods.matching import Sets, match
from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import order_gap
from tomexport.kernels.merge.reference import margin_of
from tomexport.kernels.operators import RANK
from tomexport.plan import Counting, Site, two_set_limit

_MARGIN = 0.75  # of the first block


def _keep(share: float, tokens: int, site: Site) -> int:
    n = tokens - site.n_prefix
    return tokens - math.floor(n - n * share)


def _choose(view: View) -> Choice:
    n_prefix, r = view.n_prefix, view.step.removed
    keys = view.attended.keys
    assert keys is not None
    metric = keys.mean(dim=1)[:, n_prefix:]  # (B, T, D)
    metric = metric / metric.norm(dim=2, keepdim=True)
    energy = _energy(metric, _MARGIN * (1 - view.call / view.n_calls))
    rank, order = RANK(energy)
    ordered = rows(metric, order)
    late = view.call >= math.ceil(view.n_calls / 2)
    n = 2 * r if late else metric.shape[1]  # how many can merge
    scores = ordered[:, 0:n:2] @ ordered[:, 1:n:2].mT
    matching = match(scores, Sets(np.arange(0, n, 2), np.arange(1, n, 2)), r, 0)  # (B, n)
    n_batch, n_left = rank.shape[0], metric.shape[1] - n
    others = torch.arange(n_left).expand(n_batch, -1)  # of lower energy, in its order
    slots = torch.cat([n_left + matching.target, others], dim=1).gather(1, rank)  # of each token
    stays = torch.cat([~matching.goes, others >= 0], dim=1).gather(1, rank)
    prefix = torch.arange(n_prefix).expand(n_batch, -1)

    def how_close() -> Tensor:
        gap = margin_of(scores, r, ranks_kept=True)
        return torch.minimum(gap, order_gap(energy, energy.shape[1]))

    return Choice(
        target=torch.cat([prefix, n_prefix + slots], dim=1),
        weight=view.size[:, :, 0],
        mean=True,
        margin=how_close,
        leads=torch.cat([prefix >= 0, stays], dim=1),
    )


def _energy(metric: Tensor, margin: float) -> Tensor:
    return functional.elu(metric @ metric.mT - margin).mean(dim=2)  # (B, T)


PITOME = Method(
    name="pitome",
    needs=("keys",),
    counting=Counting(two_set_limit, _keep),
    reduce=by_choice(_choose),
    weighs_keys=False,
)
