"""LV-ViT, with the layers and keys of its published checkpoints.

Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
NeurIPS 2021 (github.com/zihangJiang/TokenLabeling); written from a description of the network.

A vision transformer with a stem of four convolutions, residual branches that count half, and a
second classifier, which reads the patch tokens: the highest of its outputs over the patches, times
a half, is added to what the class token says.
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
from tomexport.exporter.models.parts import Grid, Mlp, by_rows, resampled

PATCH = 16  # pixels
_STEM = 64  # channels before the patches are cut
_EPSILON = 1e-5
_BRANCH = 0.5  # how much a residual branch counts
_AUXILIARY = 0.5  # how much the second classifier counts


@dataclass(frozen=True)
class Variant:
    """A published model: its channels, heads and blocks."""

    width: int
    heads: int
    depth: int


VARIANTS = {"lvvit_s": Variant(384, 6, 16), "lvvit_m": Variant(512, 8, 20)}


class Stem(nn.Module):
    """Three convolutions, the first of stride 2, and one that cuts patches."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, _STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.conv2 = nn.Conv2d(_STEM, _STEM, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(_STEM)
        self.conv3 = nn.Conv2d(_STEM, _STEM, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(_STEM)
        self.proj = nn.Conv2d(_STEM, dim, PATCH // 2, stride=PATCH // 2)

    def forward(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) → (B, N, C)."""
        x = functional.relu(self.bn1(self.conv1(image)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.relu(self.bn3(self.conv3(x)))
        return by_rows(self.proj(x))


class Attention(nn.Module):
    """Self-attention without biases of queries, keys and values; named as timm's is."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = n_heads, dim // n_heads, dim
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.gate = None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → the same."""
        n_batch, n, dim = x.shape
        qkv = self.qkv(x).reshape(n_batch, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, None, self.scale)
        return cast(Tensor, self.proj(out.transpose(1, 2).reshape(n_batch, n, dim)))


class Branch(nn.Module):
    """What a residual branch is multiplied by: a LayerScale that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = torch.full((1,), _BRANCH, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → the same."""
        return x * _BRANCH


class Block(nn.Module):
    """Attention and MLP; its parts are named as those of timm's Block."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attn = Attention(dim, n_heads)
        self.ls1 = Branch()
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim, 3 * dim)
        self.ls2 = Branch()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → the same."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return cast(Tensor, x + self.ls2(self.mlp(self.norm2(x))))


class LVViT(nn.Module):
    """An LV-ViT: image (B, channels, height, width) → (B, classes)."""

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        depth: int | None = None,
    ) -> None:
        """Build a variant with PyTorch's own initial values.

        Args:
            variant: its sizes.
            num_classes: 0 leaves out both classifiers, and the output is the class token.
            img_size: height and width in pixels, multiples of 16.
            in_chans: channels of the image.
            depth: blocks; None is the variant's own.

        Raises: RewriteError if the image does not divide into patches.
        """
        super().__init__()
        dim = variant.width
        self.in_chans, self.num_classes, self.embed_dim = in_chans, num_classes, dim
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        rows, columns = self.grid()
        self.patch_embed = Stem(in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + rows * columns, dim) * 0.02)
        self.blocks = nn.ModuleList(
            Block(dim, variant.heads) for _ in range(depth or variant.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(dim, num_classes) if num_classes else None

    def grid(self) -> Grid:
        """Return the rows and columns of the patches.

        Raises: RewriteError if the image does not divide into patches.
        """
        height, width = self.img_size
        if height % PATCH or width % PATCH:
            raise RewriteError(
                f"LV-ViT cuts its image into patches of {PATCH}×{PATCH} pixels, which "
                f"{height}×{width} do not divide into; use multiples of {PATCH}."
            )
        return height // PATCH, width // PATCH

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resample the positions for another image size, (height, width) in pixels.

        Raises: RewriteError if the image does not divide into patches.
        """
        old, self.img_size = self.grid(), img_size
        self.pos_embed = resampled(self.pos_embed, 1, old, self.grid(), "bicubic", antialias=True)

    def embed(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) → tokens, (B, N, C), the class token first."""
        patches = self.patch_embed(image)
        first = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1) + self.pos_embed

    def classify(self, x: Tensor) -> Tensor:
        """(B, N, C) after the norm → (B, classes); patches can be fewer than there were."""
        said: Tensor = self.head(x[:, 0])
        if self.aux_head is None:
            return said
        auxiliary: Tensor = self.aux_head(x[:, 1:]).amax(dim=1)
        return said + _AUXILIARY * auxiliary

    def forward_features(self, image: Tensor) -> Tensor:
        """Compute the tokens, (B, N, C), after the norm."""
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.norm(x))

    def forward(self, image: Tensor) -> Tensor:
        """Compute the network with all of its tokens."""
        return self.classify(self.forward_features(image))


def register(timm: Any) -> None:
    """Add the variants to timm's registry."""
    registry.register(timm, __name__, LVViT, VARIANTS, lambda v: {"input_size": (3, 224, 224)})
