"""Inputs for Merge, the same for tests and benchmarks: edges, ties and several batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One input of Merge: its sizes, and whether the metric holds ties."""

    n: int
    r: int
    n_prefix: int
    batch: int = 1
    dim: int = 16
    groups: int = 1
    channels: int = 24
    ties: str = "none"  # "none", "some": few distinct directions, "all": one direction

    @property
    def name(self) -> str:
        return f"n{self.n}-r{self.r}-p{self.n_prefix}-b{self.batch}-g{self.groups}-ties_{self.ties}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (B,N,C), size (B,N,1) and signal (B,G,N,D)."""
        generator = torch.Generator().manual_seed(self.n * 1009 + self.r * 31 + self.n_prefix)
        x = torch.randn(self.batch, self.n, self.channels, generator=generator)
        size = torch.randint(1, 9, (self.batch, self.n, 1), generator=generator).float()
        shape = (self.batch, self.groups, self.n, self.dim)
        signal = torch.randn(shape, generator=generator)
        if self.ties != "none":
            # signs have the exact length √D: every similarity is exact, so ties are true ties
            n_directions = 4 if self.ties == "some" else 1
            signs = signal[:, :1, :n_directions].sign().expand(-1, self.groups, -1, -1)
            which = torch.randint(n_directions, (self.n,), generator=generator)
            signal = signs[:, :, which]
        return x, size, signal


def cases() -> list[Case]:
    """Return the cases: smallest, ordinary, the most that can merge, every kind of prefix."""
    most = [Case(n, (n - p) // 2, p) for n, p in ((197, 1), (198, 2), (196, 0), (201, 5), (21, 1))]
    return [
        Case(197, 8, 1),
        Case(197, 16, 1, batch=3, groups=3, dim=64),
        Case(50, 12, 1, groups=2, dim=7, channels=5),
        Case(197, 0, 1, batch=3),
        Case(1, 0, 0),
        Case(1, 0, 1),
        Case(198, 13, 2, batch=3),
        Case(196, 8, 0, batch=3),
        Case(201, 8, 5),
        Case(200, 49, 4),
        *most,
        Case(2, 1, 0),
        Case(3, 1, 1),
        Case(4, 2, 0, batch=3),
        *(Case(197, 16, p, batch=3, ties=t) for p in (0, 1) for t in ("some", "all")),
        *(Case(41, 10, p, batch=3, ties=t) for p in (0, 1, 2, 5) for t in ("some", "all")),
    ]
