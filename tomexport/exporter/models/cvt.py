"""Convolutional vision Transformer (CvT), with the layers and keys of its published checkpoints.

Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021
(github.com/microsoft/CvT); written from a description of the network.

Three stages of tokens, each embedded by a convolution of the one before. Queries, keys and values
are projected from what depthwise convolutions make of the grid; those of keys and values have
stride 2. There are no positions. Only the last stage has a class token, which no convolution takes.

Scores are scaled by the width of the tokens, not of a head, as in the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tomexport.exporter.attention import attend
from tomexport.exporter.models import registry
from tomexport.exporter.models.parts import Grid, Mlp, by_rows
from tomexport.exporter.models.pyramid import EPSILON, Embedding, Pyramid

KEY_STRIDE = 2  # tokens along a side that a key stands for
_SLOPE = 1.702  # of the sigmoid that stands for the normal distribution in GELU


@dataclass(frozen=True)
class Variant:
    """A published model, stage by stage: blocks, channels, heads."""

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 192, 384)
    heads: tuple[int, ...] = (1, 3, 6)


VARIANTS = {"cvt_13": Variant((1, 2, 10)), "cvt_21": Variant((1, 4, 16))}


class Depthwise(nn.Module):
    """A depthwise convolution with batch norm."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, rows, columns) → (B, N, C), row by row."""
        return by_rows(self.bn(self.conv(x)))


class Attention(nn.Module):
    """Self-attention whose queries, keys and values are convolved before they are projected."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.scale = n_heads, dim**-0.5
        self.conv_proj_q = Depthwise(dim, 1)
        self.conv_proj_k = Depthwise(dim, KEY_STRIDE)
        self.conv_proj_v = Depthwise(dim, KEY_STRIDE)
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def split(self, h: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Part all tokens, (B, P + rows · columns, C), into prefix and (B, C, rows, columns)."""
        n_prefix = h.shape[1] - grid[0] * grid[1]
        patches = h[:, n_prefix:].transpose(1, 2)
        return h[:, :n_prefix], patches.reshape(h.shape[0], h.shape[2], *grid)

    def queries_of(self, h: Tensor, grid: Grid) -> Tensor:
        """Return what the queries of all tokens are projected from, (B, N, C) → the same."""
        prefix, patches = self.split(h, grid)
        return _beside(prefix, self.conv_proj_q(patches))

    def forward(self, asking: Tensor, h: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Attend to the whole grid.

        Args:
            asking: (B, M, C), what queries are projected from.
            h: (B, N, C), all tokens, which keys and values are convolved from.
            grid: rows and columns.

        Returns:
            (B, M, C), and the queries (B, H, M, D).
        """
        prefix, patches = self.split(h, grid)
        keys = _beside(prefix, self.conv_proj_k(patches))
        values = _beside(prefix, self.conv_proj_v(patches))
        q = self._heads(self.proj_q(asking))
        k, v = self._heads(self.proj_k(keys)), self._heads(self.proj_v(values))
        out = attend(q, k, v, None, self.scale).transpose(1, 2).flatten(2)
        return self.proj(out), q

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, H · D) → (B, H, N, D)."""
        return x.reshape(*x.shape[:2], self.n_heads, -1).transpose(1, 2)


def _beside(prefix: Tensor, x: Tensor) -> Tensor:
    return torch.cat([prefix, x], dim=1) if prefix.shape[1] else x


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_SLOPE * x)


class Block(nn.Module):
    """Attention and MLP, each on a residual path."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, n_heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp = Mlp(dim, 4 * dim, _quick_gelu)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C), all tokens of a grid of (rows, columns) → the same."""
        h = self.norm1(x)
        x = x + self.attn(self.attn.queries_of(h, grid), h, grid)[0]
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """The embedding and the blocks of a stage, with a class token or without."""

    def __init__(
        self, in_chans: int, dim: int, n_heads: int, depth: int, *, is_first: bool, is_last: bool
    ) -> None:
        super().__init__()
        window = (7, 4, 2) if is_first else (3, 2, 1)  # side, stride and padding
        self.patch_embed = Embedding(in_chans, dim, *window)
        if is_last:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, n_heads) for _ in range(depth))


class CvT(Pyramid):
    """A convolutional vision transformer: image (B, channels, height, width) → (B, classes)."""

    strides = (4, 8, 16)
    embeddings = tuple(f"stage{n}.patch_embed" for n in range(3))
    block_lists = tuple(f"stage{n}.blocks" for n in range(3))
    class_token = "stage2.cls_token"

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
            img_size: height and width in pixels, multiples of 16.
            in_chans: channels of the image.
            depths: blocks of each stage; None is the variant's own.

        Raises: RewriteError if the image does not divide into the tokens of the last stage.
        """
        super().__init__(num_classes, img_size, in_chans)
        dims = (in_chans, *variant.widths)
        for index, depth in enumerate(depths or variant.depths):
            stage = Stage(
                dims[index], dims[index + 1], variant.heads[index], depth,
                is_first=not index, is_last=index == self.n_stages - 1,
            )  # fmt: skip
            setattr(self, f"stage{index}", stage)
        self.norm = nn.LayerNorm(dims[-1], eps=EPSILON)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()


def register(timm: Any) -> None:
    """Add the variants to timm's registry."""
    registry.register(timm, __name__, CvT, VARIANTS, lambda v: {"input_size": (3, 224, 224)})
