"""Where tokens stand, for attention that reads it.

A merged token stands where the token stood that it was merged into. So its row of a table of
rotations, or its row and column of a relative bias, is that of its place (`Tokens.place`).

Sources: Su et al., RoFormer, 2021, and Heo et al., ECCV 2024, for rotary positions; Liu et al.,
Swin Transformer, ICCV 2021, and Bao et al., BEiT, ICLR 2022, for relative ones.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tomexport.exporter.zoo import timm


class Rotary(nn.Module):
    """Rotates queries and keys by the places of their tokens; prefix tokens stay as they are."""

    table: Tensor

    def __init__(self, embed: Tensor, n_prefix: int, half: bool) -> None:
        """Take a table of rotations.

        Args:
            embed: (N, 2D) or, with a table for each head, (H, N, 2D): sines beside cosines of
                the N patches.
            n_prefix: tokens in front of the patches.
            half: whether a pair is a channel and the one D/2 after it, or the one next to it.
        """
        super().__init__()
        patches = embed.reshape(-1, *embed.shape[-2:]).transpose(0, 1)  # (N, 1 or H, 2D)
        sine, cosine = torch.zeros_like(patches[:1]), torch.ones_like(patches[:1])
        d = patches.shape[2] // 2
        still = torch.cat([sine[..., :d], cosine[..., :d]], dim=2).expand(n_prefix, -1, -1)
        table = torch.cat([still, patches])
        self.register_buffer("table", table.detach(), persistent=False)
        self.in_halves = half

    def forward(self, q: Tensor, k: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotate queries (B, H, M, D), of the first M tokens, and keys (B, H or fewer, N, D)."""
        if place is None:
            turns = self.table.transpose(0, 1)  # (1 or H, N, 2D)
        else:
            rows = functional.embedding(place, self.table.flatten(1))
            turns = rows.reshape(*rows.shape[:2], *self.table.shape[1:])  # (B, N, 1 or H, 2D)
            turns = turns.transpose(1, 2)
        return self._rotated(q, turns[..., : q.shape[2], :]), self._rotated(k, turns)

    def _rotated(self, x: Tensor, turns: Tensor) -> Tensor:
        timm()
        from timm.layers import apply_rot_embed_cat

        return cast(Tensor, apply_rot_embed_cat(x, turns, half=self.in_halves))


class Relative(nn.Module):
    """Adds to the score of each pair of tokens what their places, seen together, are worth."""

    table: Tensor
    index: Tensor

    def __init__(self, table: Tensor, index: Tensor) -> None:
        """Take a table (R, H), of R relative positions, and the one of each pair, (N, N)."""
        super().__init__()
        self.register_buffer("table", table.detach(), persistent=False)
        self.register_buffer("index", index, persistent=False)

    def forward(self, place: Tensor | None, n_out: int | None) -> Tensor:
        """Return the bias of the first n_out tokens, or all, to all: (1 or B, H, n_out, N)."""
        if place is None:
            index = self.index[None, :n_out]
        else:
            n = self.index.shape[0]
            pairs = n * place[:, :n_out, None] + place[:, None, :]  # (B, n_out, N)
            index = self.index.flatten().index_select(0, pairs.flatten()).reshape(pairs.shape)
        return functional.embedding(index, self.table).permute(0, 3, 1, 2)
