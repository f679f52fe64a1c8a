"""Two-set matching by any score and any sets, traced for export.

ToMe's own, by cosines and parity, is fused in one operator (`kernels/merge/`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tomexport.kernels.merge.reference import parities
from tomexport.kernels.operators import RANK

Positions = NDArray[np.int64]


class Sets(NamedTuple):
    """The positions of A, whose tokens can go, and of B, which they go to; ascending."""

    a: Positions
    b: Positions


def by_parity(n: int, n_prefix: int) -> Sets:
    """Split n tokens into those of even and of odd position; the prefix is in neither."""
    first_a, first_b = parities(n_prefix)
    return Sets(np.arange(first_a, n, 2), np.arange(first_b, n, 2))


class Matching(NamedTuple):
    """Which tokens go, and where.

    Attributes:
        target: (B, N) slot of each token: prefix, what is left of A, then B.
        goes: (B, N) bool, the tokens of A that go.
    """

    target: Tensor
    goes: Tensor


def match(scores: Tensor, sets: Sets, r: int, n_prefix: int) -> Matching:
    """Match the r tokens of A that are most like a token of B.

    Args:
        scores: (B, |A|, |B|).
        sets: the positions of A and B.
        r: tokens that go.
        n_prefix: tokens at the front that stay. With a prefix the rest of A keeps its order;
            without one it is ordered by score, as in ToMe.
    """
    n_batch, n_a, n_b = scores.shape
    rank, _ = RANK(scores.amax(dim=2))
    goes = rank < r
    first_b = n_prefix + n_a - r
    stays = n_prefix + torch.arange(n_a) - goes.long().cumsum(dim=1) if n_prefix else rank - r
    slot_a = torch.where(goes, first_b + scores.argmax(dim=2), stays)
    numbers = torch.arange(n_prefix + n_a + n_b).expand(n_batch, -1)
    slots = torch.cat([numbers[:, :n_prefix], slot_a, numbers[:, first_b : first_b + n_b]], dim=1)
    nobody = torch.zeros(n_batch, n_prefix + n_b, dtype=torch.bool)
    goes = torch.cat([nobody[:, :n_prefix], goes, nobody[:, n_prefix:]], dim=1)
    # prefix, A and B side by side, then back into the order of the tokens
    place = torch.from_numpy(np.argsort(np.concatenate([np.arange(n_prefix), *sets])))
    return Matching(slots.index_select(1, place), goes.index_select(1, place))
