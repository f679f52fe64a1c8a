"""Inputs for Merge, the same for tests and benchmarks: edges, ties and several batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One input of Merge: its sizes, and what the directions of its signal are like.

    Attributes:
        n, r, n_prefix, batch, dim, groups, channels: sizes, as in the package's docstring.
        directions: "many": all different; "few", "one": ties, which are exact where `dim` is a
            power of four and `groups` one of two; "lost": in the middle image many tokens have
            none; "none": nor has any other there.
        raster: whether slots are numbered by their first tokens.
    """

    n: int
    r: int
    n_prefix: int
    batch: int = 1
    dim: int = 16
    groups: int = 1
    channels: int = 24
    directions: str = "many"
    raster: bool = False

    @property
    def name(self) -> str:
        sizes = f"n{self.n}-r{self.r}-p{self.n_prefix}-b{self.batch}-g{self.groups}-d{self.dim}"
        return f"{sizes}-c{self.channels}-{self.directions}{'-raster' if self.raster else ''}"

    @property
    def attributes(self) -> dict[str, int]:
        """The node's attributes."""
        return {"r": self.r, "n_prefix": self.n_prefix} | ({"raster": 1} if self.raster else {})

    @property
    def broken(self) -> int | None:
        """The image in which tokens have no direction, if there is one."""
        return self.batch // 2 if self.directions in ("lost", "none") else None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (B,N,C), size (B,N,1) and signal (B,G,N,D)."""
        generator = torch.Generator().manual_seed(self.n * 1009 + self.r * 31 + self.n_prefix)
        x = torch.randn(self.batch, self.n, self.channels, generator=generator)
        size = torch.randint(1, 9, (self.batch, self.n, 1), generator=generator).float()
        shape = (self.batch, self.groups, self.n, self.dim)
        signal = torch.randn(shape, generator=generator)
        if self.directions in ("few", "one"):
            # signs have the exact length √D: every similarity is exact, so ties are true ties
            n_directions = 4 if self.directions == "few" else 1
            signs = signal[:, :1, :n_directions].sign().expand(-1, self.groups, -1, -1)
            which = torch.randint(n_directions, (self.n,), generator=generator)
            signal = signs[:, :, which]
        if self.broken is not None:
            image = signal[self.broken]  # (G, N, D)
            image[:, 0::7] = 0
            image[0, 1::7, -1] = torch.nan
            image[-1, 2::7, 0] = torch.inf
            image[0, 3::7] = -torch.inf
            if self.directions == "none":
                image[:] = torch.nan
        return x, size, signal


def cases() -> list[Case]:
    """Return the cases: smallest, ordinary, the most that can merge, every kind of prefix."""
    most = [(197, 1), (198, 2), (196, 0), (201, 5), (21, 1), (20, 5), (9, 2), (8, 0)]
    prefixes = (0, 1, 2, 5)
    return [
        Case(197, 8, 1),
        Case(197, 16, 1, batch=3, groups=3, dim=64, channels=192),
        Case(197, 13, 1, groups=6, dim=64, channels=65),
        Case(198, 13, 2, batch=3),
        Case(196, 8, 0, batch=3),
        Case(201, 8, 5),
        Case(200, 49, 4),
        *(Case(n, (n - p) // 2, p) for n, p in most),
        *(Case(41, 0, p, batch=3) for p in prefixes),
        *(Case(1, 0, p, batch=b) for p in (0, 1) for b in (1, 3)),
        Case(5, 0, 5),
        Case(2, 1, 0),
        Case(3, 1, 1),
        Case(4, 2, 0, batch=3),
        # groups 1 to 12, with sizes that are no multiples of anything
        *(Case(40 + g, 8, g % 3, groups=g, dim=3 * g + 2, channels=11 * g) for g in range(1, 13)),
        *(Case(50, 12, 1, groups=2, dim=d, channels=5) for d in (3, 7, 15, 17, 31, 33)),
        # many: the sizes at which sorting in some runtimes stops to keep ties in order
        *(Case(197, 16, p, batch=3, directions=d) for p in (0, 1) for d in ("few", "one")),
        *(Case(41, 10, p, batch=3, directions=d) for p in prefixes for d in ("few", "one")),
        Case(30, 7, 1, dim=1, groups=4, directions="few"),
        Case(577, 288, 1, batch=2, directions="one"),
        Case(784, 200, 0, directions="few"),
        Case(4097, 64, 1, dim=6, channels=3),
        Case(4097, 2048, 1, dim=4, channels=3, directions="few"),
        Case(4096, 1000, 0, dim=4, channels=3, directions="few"),
        # no direction
        *(Case(64, r, p, batch=3, directions="lost") for p in prefixes for r in (5, 29)),
        *(Case(41, 10, p, batch=3, directions="none") for p in prefixes),
        Case(50, 20, 1, batch=2, groups=3, dim=7, directions="lost"),
        # in raster order
        Case(784, 16, 0, groups=2, dim=32, channels=64, raster=True),
        *(Case(n, n // 2, 0, batch=3, raster=True) for n in (2, 3, 10, 49, 784)),
        *(Case(41, 0, p, batch=3, raster=True) for p in prefixes),
        *(Case(41, 10, p, 3, directions=d, raster=True) for p in prefixes for d in ("few", "lost")),
        Case(41, 18, 5, batch=3, directions="one", raster=True),
        Case(197, 90, 1, batch=3, groups=3, dim=64, directions="few", raster=True),
    ]
