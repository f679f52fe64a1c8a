"""ATS with a fixed budget: the tokens of the highest significance are kept, the others dropped.

Source: Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022
(github.com/adaptivetokensampling/ATS); written from the paper.

A token's significance is what the class token attends to, summed over the heads, times the length
of its value. ATS samples by it, and takes more or fewer tokens as an image asks for; here a place
keeps the same number for all images, and those are the best. `_asked` counts what ATS would take,
so that an export can say how many images ask for more than they get.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import class_score, keep_best
from tomexport.plan import Counting, all_but_one

_NOTE = (
    "an approximation of ATS: each place keeps as many tokens of every image, the most "
    "significant, where ATS samples as many as the image asks for"
)


def _choose(view: View) -> Choice:
    return keep_best(view, _significance(view))


def _significance(view: View) -> Tensor:
    values = view.attended.values
    assert values is not None
    length: Tensor = values.square().sum(dim=(1, 3)).sqrt()  # (B, N), over all heads
    return class_score(view) * length[:, view.n_prefix :]


def _asked(view: View) -> Tensor:
    """Return how many tokens ATS would leave of each image, (B,), the prefix included.

    It samples as many as there are, at even steps of the sum of significances so far; a token that
    is met more than once stays once.
    """
    score = _significance(view)  # (B, N − P)
    n = score.shape[1]
    so_far = (score / score.sum(dim=1, keepdim=True)).cumsum(dim=1)
    steps = (torch.arange(n) + 0.5) / n
    met = (so_far[:, :, None] - steps).abs().argmin(dim=1)  # (B, n)
    return view.n_prefix + torch.zeros_like(score).scatter(1, met, 1.0).sum(dim=1).long()


ATS = Method(
    name="ats",
    needs=("class_attention", "values"),
    counting=Counting(all_but_one, note=_NOTE),
    reduce=by_choice(_choose),
    sizes=False,
    drops=True,
    asked=_asked,
)
