"""Rank in torch: this defines what every other form must compute."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rank(score: Float[Tensor, "B N"]) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Rank tokens by their scores, the highest first, ties by index.

    Returns:
        The rank of each token, and the token of each rank.
    """
    number = torch.where(score.isnan(), -torch.inf, score)
    order = number.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1), order
