"""Predictors: small networks before some blocks that score the tokens, as DynamicViT trains them.

Source: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
NeurIPS 2021 (github.com/raoyongming/DynamicViT); written from the paper.

In a checkpoint they are `score_predictor.0`, `score_predictor.1`, …, in the order of their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tomexport.errors import PlanError
from tomexport.exporter.methods.method import Own, View
from tomexport.plan import BEFORE, Counting, Site, Step, all_but_one, keep_of_first

PREFIX = "score_predictor"
_EPSILON = 1e-5


class Predictor(nn.Module):
    """Scores each token by what it holds, and by what all hold on average."""

    def __init__(self, dim: int) -> None:
        """Take tokens of dim channels, a multiple of 4."""
        super().__init__()
        self.in_conv = nn.Sequential(
            nn.LayerNorm(dim, eps=_EPSILON), nn.Linear(dim, dim), nn.GELU()
        )
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(),
            nn.Linear(dim // 2, dim // 4), nn.GELU(),
            nn.Linear(dim // 4, 2), nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → the logarithm of each token's probability of being kept, (B, N)."""
        own, of_all = self.in_conv(x).chunk(2, dim=2)
        of_all = of_all.mean(dim=1, keepdim=True).expand_as(own)
        score: Tensor = self.out_conv(torch.cat([own, of_all], dim=2))[:, :, 0]
        return score


def predicted_score(view: View) -> Tensor:
    """Return what the predictor of a place says of the tokens after the prefix, (B, N − P)."""
    assert view.weights is not None
    score: Tensor = view.weights(view.x[:, view.n_prefix :])
    return score


def predictors(
    sites: Sequence[Site], steps: Sequence[Step], extras: Mapping[str, Tensor]
) -> list[Own | None]:
    """Give each place of a schedule its predictor.

    Raises: PlanError if there are not as many places as the checkpoint has predictors.
    """
    places = [index for index, step in enumerate(steps) if step.removed]
    known = {key.split(".")[1] for key in extras if key.startswith(f"{PREFIX}.")}
    if known and places and len(known) != len(places):
        raise PlanError(
            f"The checkpoint has {len(known)} predictors, but the schedule removes tokens at "
            f"{len(places)} blocks. Each predictor was trained for a place of its own: name "
            f"{len(known)} blocks, as in keep:0.7@3,6,9."
        )
    own: list[Own | None] = [None] * len(sites)
    for number, index in enumerate(places):
        own[index] = Own(f"{PREFIX}.{number}", Predictor(sites[index].width))
    return own


def _macs(site: Site, tokens: int) -> int:
    dim = site.width
    layers = ((dim, dim), (dim, dim // 2), (dim // 2, dim // 4), (dim // 4, 2))
    return (tokens - site.n_prefix) * sum(a * b for a, b in layers)


PREDICTED = Counting(all_but_one, keep_of_first, powers=True, place=BEFORE, macs=_macs)
