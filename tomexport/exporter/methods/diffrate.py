"""DiffRate: tokens that the class token attends to least are dropped, the next ones merge.

Source: Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
ICCV 2023 (github.com/OpenGVLab/DiffRate); written from the paper.

Tokens are ranked by the attention of the class token, averaged over the heads. The schedule
`diffrate:…` says how many stay after pruning and how many after merging, in each block; with any
other schedule all that go merge. One that merges joins the token most like it, by the cosine of the
tokens themselves, among those that stay, the class token aside. Values are plain means; what a
token brings to the size is its own size times that cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tomexport.exporter.gather import rows
from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import NOWHERE, class_score, host_gap, order_gap
from tomexport.kernels.operators import RANK
from tomexport.plan import Counting, all_but_one


def _choose(view: View) -> Choice:
    n_prefix, step = view.n_prefix, view.step
    score = class_score(view)
    n_batch, n = score.shape
    n_left, n_joining = step.tokens_out - n_prefix, step.removed - step.pruned
    rank, order = RANK(score)
    x = view.x[:, n_prefix:]
    ordered = rows(x / x.norm(dim=2, keepdim=True), order)
    alike = ordered[:, n_left : n_left + n_joining] @ ordered[:, :n_left].mT
    stay = torch.arange(step.tokens_out).expand(n_batch, -1)
    slots, shares = [stay], [score.new_ones(n_batch, step.tokens_out)]
    if n_joining:
        slots.append(n_prefix + alike.argmax(dim=2))
        shares.append(alike.amax(dim=2))
    if step.pruned:
        slots.append(torch.full((n_batch, step.pruned), NOWHERE))
        shares.append(score.new_zeros(n_batch, step.pruned))
    place = torch.cat([stay[:, :n_prefix], n_prefix + rank], dim=1)  # in that order

    def how_close() -> Tensor:
        gap = order_gap(score, n - step.pruned)
        return torch.minimum(gap, host_gap(alike)) if n_joining else gap

    return Choice(
        target=torch.cat(slots, dim=1).gather(1, place),
        weight=score.new_ones(1, step.tokens_in),
        mean=True,
        margin=how_close,
        leads=place < step.tokens_out,
        share=torch.cat(shares, dim=1).gather(1, place),
    )


DIFFRATE = Method(
    name="diffrate",
    needs=("class_attention",),
    counting=Counting(all_but_one),
    reduce=by_choice(_choose),
)
