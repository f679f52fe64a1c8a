"""Inputs for Rank, the same for tests and benchmarks: edges, ties, what is no number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One input of Rank: its sizes, and what its scores are like.

    Attributes:
        n, batch: sizes, as in the package's docstring.
        scores: "many": all different; "few", "one": ties; "odd": NaN, infinities, zeros of both
            signs and neighbours among them.
    """

    n: int
    batch: int = 1
    scores: str = "many"

    @property
    def name(self) -> str:
        return f"n{self.n}-b{self.batch}-{self.scores}"

    @property
    def attributes(self) -> dict[str, int]:
        """The node's attributes: none."""
        return {}

    def inputs(self) -> tuple[Tensor]:
        """Return score (B,N)."""
        generator = torch.Generator().manual_seed(self.n * 1009 + self.batch)
        score = torch.randn(self.batch, self.n, generator=generator)
        if self.scores in ("few", "one"):
            n_values = 9 if self.scores == "few" else 1
            score = score[:, torch.randint(n_values, (self.n,), generator=generator) % self.n]
        elif self.scores == "odd":
            values = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0, 1.0, 1 + 2**-23])
            which = torch.randint(2 * len(values), score.shape, generator=generator)
            score = torch.where(which < len(values), values[which % len(values)], score)
        return (score,)


def cases() -> list[Case]:
    """Return the cases: smallest, ordinary, largest, ties, and what is no number."""
    return [
        *(Case(n, batch=b) for n in (1, 2, 3, 196) for b in (1, 3)),
        *(Case(n) for n in (15, 16, 17, 98, 576)),
        *(Case(197, batch=3, scores=scores) for scores in ("few", "one", "odd")),
        *(Case(4097, scores=scores) for scores in ("many", "few")),
    ]
