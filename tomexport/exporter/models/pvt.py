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
from torch.nn import functional

from tomexport.errors import RewriteError
from tomexport.exporter.attention import attend
from tomexport.exporter.models import registry

GRAIN = 32  # pixels that a token of the last stage, and a key of each other, stands for
STRIDES = (4, 8, 16, 32)  # pixels that a token of each stage stands for
N_STAGES = len(STRIDES)
_EPSILON, _EPSILON_OF_GRIDS = 1e-6, 1e-5  # of blocks; where a convolution was


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


class Patches(nn.Module):
    """Cuts a grid into patches, and makes a token of each."""

    def __init__(self, in_chans: int, dim: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, side, stride=side)
        self.norm = nn.LayerNorm(dim, eps=_EPSILON_OF_GRIDS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, rows, columns) → (B, N, C)."""
        return cast(Tensor, self.norm(self.proj(x).flatten(2).transpose(1, 2)))


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
            self.norm = nn.LayerNorm(dim, eps=_EPSILON_OF_GRIDS)

    def coarser(self, h: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what keys and values are of: tokens (B, N, C) of a grid → (B, fewer, C)."""
        if not self.is_coarser:
            return h
        x = self.sr(h.transpose(1, 2).reshape(h.shape[0], h.shape[2], *grid))
        return cast(Tensor, self.norm(x.flatten(2).transpose(1, 2)))

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


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → the same."""
        return cast(Tensor, self.fc2(functional.gelu(self.fc1(x))))


class Block(nn.Module):
    """Attention and MLP, each on a residual path."""

    def __init__(self, dim: int, n_heads: int, mlp: int, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attn = Attention(dim, n_heads, side)
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim, mlp * dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, C), all tokens of a grid of (rows, columns) → the same."""
        h = self.norm1(x)
        x = x + self.attn(h, self.attn.coarser(h, grid), None)[0]
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class PVT(nn.Module):
    """A pyramid vision transformer: image (B, channels, height, width) → (B, classes)."""

    n_stages = N_STAGES

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
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self._check_size()
        dims = variant.widths
        for stage, depth in enumerate(depths or variant.depths):
            dim, stride = dims[stage], STRIDES[stage]
            cut = Patches(dims[stage - 1], dim, 2) if stage else Patches(in_chans, dim, stride)
            rows, columns = self.grid(stage)
            n_positions = rows * columns + self.n_prefix(stage)
            blocks = nn.ModuleList(
                Block(dim, variant.heads[stage], variant.mlps[stage], GRAIN // stride)
                for _ in range(depth)
            )
            setattr(self, f"patch_embed{stage + 1}", cut)
            setattr(self, f"pos_embed{stage + 1}", nn.Parameter(_drawn(n_positions, dim)))
            setattr(self, f"block{stage + 1}", blocks)
        self.norm = nn.LayerNorm(dims[-1], eps=_EPSILON)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def blocks(self, stage: int) -> nn.ModuleList:
        """Return the blocks of a stage, counted from 0."""
        return cast(nn.ModuleList, getattr(self, f"block{stage + 1}"))

    def patches(self, stage: int) -> Patches:
        """Return what makes the tokens of a stage."""
        return cast(Patches, getattr(self, f"patch_embed{stage + 1}"))

    def n_prefix(self, stage: int) -> int:
        """Return how many class tokens a stage has."""
        return int(stage == N_STAGES - 1)

    def grid(self, stage: int) -> tuple[int, int]:
        """Return rows and columns of a stage's patches."""
        height, width = self.img_size
        return height // STRIDES[stage], width // STRIDES[stage]

    def _check_size(self) -> None:
        height, width = self.img_size
        if height % GRAIN or width % GRAIN or not height * width:
            raise RewriteError(
                f"PVT makes its last tokens of {GRAIN}×{GRAIN} pixels each, which {height}×{width} "
                f"do not divide into; use multiples of {GRAIN}."
            )

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resample the positions for another image size, (height, width) in pixels.

        Raises: RewriteError if the grid of a stage would not divide into patches.
        """
        old = [self.grid(stage) for stage in range(N_STAGES)]
        self.img_size = img_size
        self._check_size()
        for stage in range(N_STAGES):
            position = getattr(self, f"pos_embed{stage + 1}").detach()
            n_first = self.n_prefix(stage)
            first, patches = position[:, :n_first], position[:, n_first:]
            maps = patches.transpose(1, 2).reshape(1, -1, *old[stage])
            maps = functional.interpolate(maps, self.grid(stage), mode="bilinear")
            position = torch.cat([first, maps.flatten(2).transpose(1, 2)], dim=1)
            setattr(self, f"pos_embed{stage + 1}", nn.Parameter(position))

    def embed(self, stage: int, x: Tensor) -> Tensor:
        """Make the tokens of a stage, (B, N, C); the class token of the last one first.

        Args:
            stage: counted from 0.
            x: the image, or all tokens of the stage before, (B, N, C).
        """
        if stage:
            x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.grid(stage - 1))
        x = self.patches(stage)(x)
        if self.n_prefix(stage):
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + cast(Tensor, getattr(self, f"pos_embed{stage + 1}"))

    def forward_features(self, image: Tensor) -> Tensor:
        """Compute the tokens of the last stage, (B, N, C), after the norm."""
        x = image
        for stage in range(N_STAGES):
            x = self.embed(stage, x)
            for block in self.blocks(stage):
                x = block(x, self.grid(stage))
        return cast(Tensor, self.norm(x))

    def forward(self, image: Tensor) -> Tensor:
        """Compute the network with all of its tokens."""
        return cast(Tensor, self.head(self.forward_features(image)[:, 0]))


def _drawn(n: int, dim: int) -> Tensor:
    return torch.randn(1, n, dim) * 0.02


def register(timm: Any) -> None:
    """Add the variants to timm's registry."""
    registry.register(timm, __name__, PVT, VARIANTS, lambda v: {"input_size": (3, 224, 224)})
