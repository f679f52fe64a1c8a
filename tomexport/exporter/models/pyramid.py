"""What PVT and CvT share: stages of tokens, each convolved from the grid of the one before.

Blocks see the grid that their tokens are of. Only the last stage has a class token, the first of
its tokens, which no convolution takes. There the head reads.
"""

from __future__ import annotations

from operator import attrgetter
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from tomexport.errors import RewriteError
from tomexport.exporter.models.parts import Grid, by_rows, on_grid

EPSILON = 1e-5  # of norms, but for those of the blocks of PVT


class Embedding(nn.Module):
    """A convolution of the grid that makes a token of each window, and a norm."""

    def __init__(self, in_chans: int, dim: int, side: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, side, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, rows, columns) → (B, N, C)."""
        return cast(Tensor, self.norm(by_rows(self.proj(x))))


class Pyramid(nn.Module):
    """Stages of tokens, a norm and a head: image (B, channels, height, width) → (B, classes).

    Attributes:
        strides: pixels that a token of each stage stands for.
        embeddings, block_lists: what those of each stage are called.
        class_token: what that of the last stage is called.
    """

    strides: ClassVar[tuple[int, ...]]
    embeddings: ClassVar[tuple[str, ...]]
    block_lists: ClassVar[tuple[str, ...]]
    class_token: ClassVar[str]
    norm: nn.Module
    head: nn.Module

    def __init__(self, num_classes: int, img_size: int | tuple[int, int], in_chans: int) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = self._checked(size)

    @property
    def n_stages(self) -> int:
        """How many stages there are."""
        return len(self.strides)

    def blocks(self, stage: int) -> nn.ModuleList:
        """Return the blocks of a stage, counted from 0."""
        return cast(nn.ModuleList, attrgetter(self.block_lists[stage])(self))

    def patches(self, stage: int) -> Embedding:
        """Return what makes the tokens of a stage."""
        return cast(Embedding, attrgetter(self.embeddings[stage])(self))

    def n_prefix(self, stage: int) -> int:
        """Return how many class tokens a stage has."""
        return int(stage == self.n_stages - 1)

    def grid(self, stage: int) -> Grid:
        """Return rows and columns of a stage's patches."""
        height, width = self.img_size
        return height // self.strides[stage], width // self.strides[stage]

    def _checked(self, img_size: tuple[int, int]) -> tuple[int, int]:
        (height, width), grain = img_size, self.strides[-1]
        if height % grain or width % grain or not height * width:
            raise RewriteError(
                f"{type(self).__name__} makes its last tokens of {grain}×{grain} pixels each, "
                f"which {height}×{width} do not divide into; use multiples of {grain}."
            )
        return img_size

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Set another image size, (height, width) in pixels.

        Raises: RewriteError if the image does not divide into the tokens of the last stage.
        """
        self.img_size = self._checked(img_size)

    def embed(self, stage: int, x: Tensor) -> Tensor:
        """Make the tokens of a stage, (B, N, C); the class token of the last one first.

        Args:
            stage: counted from 0.
            x: the image, or all tokens of the stage before, (B, N, C).
        """
        x = self.patches(stage)(on_grid(x, self.grid(stage - 1)) if stage else x)
        if not self.n_prefix(stage):
            return x
        token: Tensor = attrgetter(self.class_token)(self)
        return torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)

    def forward_features(self, image: Tensor) -> Tensor:
        """Compute the tokens of the last stage, (B, N, C), after the norm."""
        x = image
        for stage in range(self.n_stages):
            x = self.embed(stage, x)
            for block in self.blocks(stage):
                x = block(x, self.grid(stage))
        return cast(Tensor, self.norm(x))

    def forward(self, image: Tensor) -> Tensor:
        """Compute the network with all of its tokens."""
        return cast(Tensor, self.head(self.forward_features(image)[:, 0]))
