"""Pyramid Vision Transformer (PVT), with the layers and keys of its published checkpoints.

Source: Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
Convolutions", ICCV 2021 (github.com/whai362/PVT); written from a description of the network.

Four stages of tokens, each from patches of the one before. Keys and values are of a coarser grid
than the tokens: a strided convolution makes one of each patch of tokens. Only the last stage does
without, and has a class token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tomexport.exporter.attention import attend
from tomexport.exporter.models import registry
from tomexport.exporter.models.parts import Grid, Mlp, by_rows, on_grid, resampled
from tomexport.exporter.models.pyramid import EPSILON, Embedding, Pyramid

_EPSILON = 1e-6  # of norms in blocks and the last
_STAGES = range(1, 5)  # as their parts are numbered


@dataclass(frozen=True)
class Variant:
    """A published model, stage by stage: blocks, channels, heads, hidden channels per channel."""

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 320, 512)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    mlps: tuple[int, ...] = (8, 8, 4, 4)


VARIANTS = {
    "pvt_tiny": Variant((2, 2, 2, 2)),
    "pvt_small": Variant((3, 4, 6, 3)),
    "pvt_medium": Variant((3, 4, 18, 3)),
    "pvt_large": Variant((3, 8, 27, 3)),
}


class Attention(nn.Module):
    """Self-attention to a coarser grid than that of the tokens."""

    def __init__(self, dim: int, n_heads: int, side: int) -> None:
        super().__init__()
        self.n_heads, self.scale = n_heads, (dim // n_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.is_coarser = side > 1
        if self.is_coarser:
            self.sr = nn.Conv2d(dim, dim, side, stride=side)
            self.norm = nn.LayerNorm(dim, eps=EPSILON)

    def coarser(self, h: Tensor, grid: Grid) -> Tensor:
        """Return what keys and values are of: tokens (B, N, C) of a grid → (B, fewer, C)."""
        if not self.is_coarser:
            return h
        return cast(Tensor, self.norm(by_rows(self.sr(on_grid(h, grid)))))

    def forward(self, h: Tensor, seen: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend from tokens to what is seen.

        Args:
            h: (B, M, C), the tokens.
            seen: (B, N, C), what keys and values are of.
            bias: (1 or B, 1, 1, N), what is added to the scores of each key.

        Returns:
            (B, M, C), and the queries (B, H, M, D).
        """
        q = self._heads(self.q(h))
        k, v = torch.split(self._heads(self.kv(seen)), self.n_heads, dim=1)
        out = attend(q, k, v, bias, self.scale).transpose(1, 2).flatten(2)
        return self.proj(out), q

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, any number of heads · D) → (B, that number, N, D)."""
        width = self.q.out_features // self.n_heads
        return x.reshape(*x.shape[:2], -1, width).transpose(1, 2)


class Block(nn.Module):
    """Attention and MLP, each on a residual path."""

    def __init__(self, dim: int, n_heads: int, mlp: int, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attn = Attention(dim, n_heads, side)
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim, mlp * dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C), all tokens of a grid of (rows, columns) → the same."""
        h = self.norm1(x)
        x = x + self.attn(h, self.attn.coarser(h, grid), None)[0]
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class PVT(Pyramid):
    """A pyramid vision transformer: image (B, channels, height, width) → (B, classes)."""

    strides = (4, 8, 16, 32)
    embeddings = tuple(f"patch_embed{n}" for n in _STAGES)
    positions = tuple(f"pos_embed{n}" for n in _STAGES)
    block_lists = tuple(f"block{n}" for n in _STAGES)
    class_token = "cls_token"

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        depths: tuple[int, ...] | None = None,
    ) -> None:
        """Build a variant with PyTorch's own initial values.

        Args:
            variant: its sizes.
            num_classes: 0 leaves out the head, and the output is the class token.
            img_size: height and width in pixels, multiples of 32.
            in_chans: channels of the image.
            depths: blocks of each stage; None is the variant's own.

        Raises: RewriteError if the grid of a stage does not divide into patches.
        """
        super().__init__(num_classes, img_size, in_chans)
        dims, grain = (in_chans, *variant.widths), self.strides[-1]
        for stage, depth in enumerate(depths or variant.depths):
            dim, stride = dims[stage + 1], self.strides[stage]
            side = 2 if stage else stride
            embedding = Embedding(dims[stage], dim, side, side)
            blocks = nn.ModuleList(  # a key stands for as many pixels as the last tokens
                Block(dim, variant.heads[stage], variant.mlps[stage], grain // stride)
                for _ in range(depth)
            )
            rows, columns = self.grid(stage)
            positions = torch.randn(1, self.n_prefix(stage) + rows * columns, dim) * 0.02
            setattr(self, self.embeddings[stage], embedding)
            setattr(self, self.positions[stage], nn.Parameter(positions))
            setattr(self, self.block_lists[stage], blocks)
        self.norm = nn.LayerNorm(dims[-1], eps=_EPSILON)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resample the positions for another image size, (height, width) in pixels.

        Raises: RewriteError if the grid of a stage would not divide into patches.
        """
        old = [self.grid(stage) for stage in range(self.n_stages)]
        super().set_input_size(img_size)
        for stage, name in enumerate(self.positions):
            first, grid = self.n_prefix(stage), self.grid(stage)
            setattr(self, name, resampled(getattr(self, name), first, old[stage], grid, "bilinear"))

    def embed(self, stage: int, x: Tensor) -> Tensor:
        """Make the tokens of a stage as `Pyramid` does, and add their positions."""
        return super().embed(stage, x) + cast(Tensor, getattr(self, self.positions[stage]))


def register(timm: Any) -> None:
    """Add the variants to timm's registry."""
    registry.register(timm, __name__, PVT, VARIANTS, lambda v: {"input_size": (3, 224, 224)})
