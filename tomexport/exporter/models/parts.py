"""What several of these networks are made of, and how they lay tokens out on a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Grid = tuple[int, int]  # rows and columns


class Mlp(nn.Module):
    """Linear, an activation, Linear."""

    def __init__(
        self, dim: int, hidden: int, act: Callable[[Tensor], Tensor] = functional.gelu
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → the same."""
        return cast(Tensor, self.fc2(self.act(self.fc1(x))))


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """(B, rows · columns, C), row by row → (B, C, rows, columns)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)


def by_rows(maps: Tensor) -> Tensor:
    """(B, C, rows, columns) → (B, rows · columns, C), row by row."""
    return maps.flatten(2).transpose(1, 2)


def resampled(
    positions: Tensor, n_prefix: int, old: Grid, new: Grid, mode: str, *, antialias: bool = False
) -> nn.Parameter:
    """Return positions, (1, P + N, C), for another grid; those of the P prefix tokens stay."""
    positions = positions.detach()
    maps = on_grid(positions[:, n_prefix:], old)
    maps = functional.interpolate(maps, new, mode=mode, antialias=antialias)
    return nn.Parameter(torch.cat([positions[:, :n_prefix], by_rows(maps)], dim=1))
