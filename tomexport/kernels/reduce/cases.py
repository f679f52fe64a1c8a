"""Inputs for Reduce, the same for tests and benchmarks: edges, dropped tokens, several batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One input of Reduce: its sizes.

    Attributes:
        n, r, batch, channels: sizes, as in the package's docstring.
        dropped: how many tokens go nowhere.
        mean: whether weights are relative.
    """

    n: int
    r: int
    batch: int = 1
    channels: int = 24
    dropped: int = 0
    mean: int = 1

    @property
    def name(self) -> str:
        return f"n{self.n}-r{self.r}-b{self.batch}-c{self.channels}-d{self.dropped}-m{self.mean}"

    @property
    def attributes(self) -> dict[str, int]:
        """The node's attributes."""
        return {"r": self.r, "mean": self.mean}

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x (B,N,C), mass (B,N,1), target (B,N) and weight (B,N,1)."""
        generator = torch.Generator().manual_seed(self.n * 1009 + self.r * 31 + self.dropped)
        x = torch.randn(self.batch, self.n, self.channels, generator=generator)
        mass = torch.randint(1, 9, (self.batch, self.n, 1), generator=generator).float()
        weight = torch.rand(self.batch, self.n, 1, generator=generator) + 0.1
        n_slots = self.n - self.r
        targets = []
        for _ in range(self.batch):
            others = torch.randint(n_slots, (self.r - self.dropped,), generator=generator)
            nowhere = torch.full((self.dropped,), -1)
            target = torch.cat([torch.arange(n_slots), others, nowhere])
            targets.append(target[torch.randperm(self.n, generator=generator)])
        return x, mass, torch.stack(targets), weight


def cases() -> list[Case]:
    """Return the cases: smallest, ordinary, nothing removed, all into one, some or all dropped."""
    return [
        Case(197, 57, channels=192, dropped=57, mean=0),
        Case(197, 57, batch=3, channels=65, mean=0),
        Case(197, 59, batch=3, dropped=20),
        *(Case(1, 0, batch=b) for b in (1, 3)),
        Case(2, 1),
        Case(40, 0, batch=3, mean=0),
        Case(40, 39, batch=3),
        Case(40, 39, dropped=39, mean=0),
        *(Case(50 + c, 12, batch=2, channels=c, dropped=3) for c in (1, 7, 15, 16, 17, 33)),
        Case(4097, 2048, channels=3, dropped=100),
    ]
