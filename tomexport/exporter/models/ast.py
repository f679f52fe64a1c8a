"""AST, a vision transformer over a spectrogram, with the keys of its published checkpoints.

Source: Gong et al., "AST: Audio Spectrogram Transformer", Interspeech 2021
(github.com/YuanGongND/ast); written from the paper.

The input is the log-mel spectrogram as an image of one channel, frequency down and time across:
(B, 1, 128, 1024). Patches overlap. What the class token and DeiT's second token hold is averaged,
normed once more and classified.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tomexport.errors import RewriteError
from tomexport.exporter.models import registry
from tomexport.exporter.models.parts import Grid, by_rows, resampled

PATCH, STRIDE = 16, 10
N_BINS, N_TIMES = 128, 1024  # that it was trained on: ten seconds
_EPSILON = 1e-6
_MEAN, _STD = -4.2677393, 2 * 4.5689974  # of AudioSet; the authors divide by two deviations


@dataclass(frozen=True)
class Variant:
    """A published model: its channels, heads and blocks."""

    width: int
    heads: int
    depth: int = 12


VARIANTS = {"ast_tiny": Variant(192, 3), "ast_small": Variant(384, 6), "ast_base": Variant(768, 12)}


class Patches(nn.Module):
    """Cuts a spectrogram into overlapping patches and projects each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, PATCH, stride=STRIDE)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """(B, 1, frequencies, times) → (B, N, C)."""
        return by_rows(self.proj(spectrogram))


class AST(nn.Module):
    """An AST: spectrogram (B, 1, frequencies, times) → (B, classes)."""

    num_prefix_tokens = 2
    n_read = 2
    grain = (1, 1)

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 527,
        img_size: tuple[int, int] = (N_BINS, N_TIMES),
        depth: int | None = None,
    ) -> None:
        """Build a variant with PyTorch's own initial values.

        Args:
            variant: its sizes.
            num_classes: 0 leaves out the classifier, and the output is the normed average.
            img_size: frequencies and times.
            depth: blocks; None is the variant's own.

        Raises: RewriteError if there is no patch in the spectrogram.
        """
        from timm.models.vision_transformer import Block

        super().__init__()
        self.num_classes, self.embed_dim, dim = num_classes, variant.width, variant.width
        self.img_size = img_size
        rows, columns = self.grid()
        self.patch_embed = Patches(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + rows * columns, dim) * 0.02)
        norm = partial(nn.LayerNorm, eps=_EPSILON)
        self.blocks = nn.ModuleList(
            Block(dim, variant.heads, qkv_bias=True, norm_layer=norm)
            for _ in range(depth or variant.depth)
        )
        self.norm = norm(dim)
        self.fc_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def grid(self) -> Grid:
        """Return the patches along frequency and time.

        Raises: RewriteError if there is none.
        """
        if min(self.img_size) < PATCH:
            raise RewriteError(
                f"A spectrogram of {self.img_size[0]}×{self.img_size[1]} holds no patch of "
                f"{PATCH}×{PATCH}; give more frequencies or times."
            )
        rows, columns = ((side - PATCH) // STRIDE + 1 for side in self.img_size)
        return rows, columns

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resample the positions for other numbers of frequencies and times.

        Raises: RewriteError if there is no patch in the spectrogram.
        """
        old, self.img_size = self.grid(), img_size
        self.pos_embed = resampled(self.pos_embed, 2, old, self.grid(), "bilinear")

    @property
    def n_patches(self) -> int:
        """Patches of a spectrogram."""
        rows, columns = self.grid()
        return rows * columns

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(1, frequencies, times)."""
        return (1, *self.img_size)

    def embed(self, spectrogram: Tensor) -> Tensor:
        """(B, 1, frequencies, times) → tokens, (B, N, C), the two that are read first."""
        patches = self.patch_embed(spectrogram)
        first = torch.cat([self.cls_token, self.dist_token], dim=1)
        return torch.cat([first.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed

    def classify(self, x: Tensor, size: Tensor | None) -> Tensor:
        """Tokens (B, M, C) after the norm → (B, classes), whatever their sizes."""
        del size
        return cast(Tensor, self.head(self.fc_norm(x[:, :2].mean(dim=1))))

    def forward_features(self, spectrogram: Tensor) -> Tensor:
        """Compute the tokens, (B, N, C), after the norm."""
        x = self.embed(spectrogram)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.norm(x))

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Compute the network with all of its tokens."""
        return self.classify(self.forward_features(spectrogram), None)


def register(timm: Any) -> None:
    """Add the variants to timm's registry."""
    configuration = {"input_size": (1, N_BINS, N_TIMES), "mean": (_MEAN,), "std": (_STD,)}
    registry.register(timm, __name__, AST, VARIANTS, lambda v: configuration)
