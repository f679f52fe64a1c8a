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

from tomexport.errors import RewriteError
from tomexport.exporter.attention import attend
from tomexport.exporter.models import registry

GRAIN = 16  # pixels that a token of the last stage stands for
STRIDES = (4, 8, 16)  # pixels that a token of each stage stands for
N_STAGES = len(STRIDES)
KEY_STRIDE = 2  # tokens along a side that a key stands for
_EPSILON = 1e-5
_SLOPE = 1.702  # of the sigmoid that stands for the normal distribution in GELU

Grid = tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """A published model, stage by stage: blocks, channels, heads."""

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 192, 384)
    heads: tuple[int, ...] = (1, 3, 6)


VARIANTS = {"cvt_13": Variant((1, 2, 10)), "cvt_21": Variant((1, 4, 16))}


class Embedding(nn.Module):
    """A convolution whose windows overlap; each makes a token."""

    def __init__(self, in_chans: int, dim: int, *, is_first: bool) -> None:
        super().__init__()
        side, stride, padding = (7, STRIDES[0], 2) if is_first else (3, 2, 1)
        self.proj = nn.Conv2d(in_chans, dim, side, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, rows, columns) → (B, N, C)."""
        return cast(Tensor, self.norm(self.proj(x).flatten(2).transpose(1, 2)))


class Depthwise(nn.Module):
    """A depthwise convolution with batch norm."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, rows, columns) → (B, N, C), row by row."""
        return cast(Tensor, self.bn(self.conv(x)).flatten(2).transpose(1, 2))


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


class Mlp(nn.Module):
    """Linear, GELU by a sigmoid, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → the same."""
        x = self.fc1(x)
        return cast(Tensor, self.fc2(x * torch.sigmoid(_SLOPE * x)))


class Block(nn.Module):
    """Attention and MLP, each on a residual path."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attn = Attention(dim, n_heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim)

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
        self.patch_embed = Embedding(in_chans, dim, is_first=is_first)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if is_last else None
        self.blocks = nn.ModuleList(Block(dim, n_heads) for _ in range(depth))


class CvT(nn.Module):
    """A convolutional vision transformer: image (B, channels, height, width) → (B, classes)."""

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
            img_size: height and width in pixels, multiples of 16.
            in_chans: channels of the image.
            depths: blocks of each stage; None is the variant's own.

        Raises: RewriteError if the image does not divide into the tokens of the last stage.
        """
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.set_input_size((img_size, img_size) if isinstance(img_size, int) else img_size)
        dims, last = (in_chans, *variant.widths), N_STAGES - 1
        for index, depth in enumerate(depths or variant.depths):
            stage = Stage(
                dims[index], dims[index + 1], variant.heads[index], depth,
                is_first=not index, is_last=index == last,
            )  # fmt: skip
            setattr(self, f"stage{index}", stage)
        self.norm = nn.LayerNorm(dims[-1], eps=_EPSILON)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def _stage(self, stage: int) -> Stage:
        return cast(Stage, getattr(self, f"stage{stage}"))

    def blocks(self, stage: int) -> nn.ModuleList:
        """Return the blocks of a stage, counted from 0."""
        return self._stage(stage).blocks

    def patches(self, stage: int) -> Embedding:
        """Return what makes the tokens of a stage."""
        return self._stage(stage).patch_embed

    def n_prefix(self, stage: int) -> int:
        """Return how many class tokens a stage has."""
        return int(self._stage(stage).cls_token is not None)

    def grid(self, stage: int) -> Grid:
        """Return rows and columns of a stage's patches."""
        height, width = self.img_size
        return height // STRIDES[stage], width // STRIDES[stage]

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Set another image size, (height, width) in pixels; there are no positions to resample.

        Raises: RewriteError if the image does not divide into the tokens of the last stage.
        """
        height, width = img_size
        if height % GRAIN or width % GRAIN or not height * width:
            raise RewriteError(
                f"CvT makes its last tokens of {GRAIN}×{GRAIN} pixels each, which {height}×{width} "
                f"do not divide into; use multiples of {GRAIN}."
            )
        self.img_size = img_size

    def embed(self, stage: int, x: Tensor) -> Tensor:
        """Make the tokens of a stage, (B, N, C); the class token of the last one first.

        Args:
            stage: counted from 0.
            x: the image, or all tokens of the stage before, (B, N, C).
        """
        if stage:
            x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.grid(stage - 1))
        x = self.patches(stage)(x)
        token = self._stage(stage).cls_token
        return x if token is None else torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)

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


def register(timm: Any) -> None:
    """Add the variants to timm's registry."""
    registry.register(timm, __name__, CvT, VARIANTS, lambda v: {"input_size": (3, 224, 224)})
