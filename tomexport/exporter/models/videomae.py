"""VideoMAE's classifiers: a vision transformer over tubes of two frames, with its published keys.

Source: Tong et al., "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised
Video Pre-Training", NeurIPS 2022 (github.com/MCG-NJU/VideoMAE); written from the paper.

A clip comes in as an image whose channels are the frames one after another, each with its own
channels: (B, frames · 3, height, width), which is (B, frames, 3, height, width) reshaped. There is
no class token; positions are sines and cosines along the whole sequence; the mean of the tokens is
normed and classified.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tomexport.errors import RewriteError
from tomexport.exporter.models import registry
from tomexport.exporter.models.parts import by_rows

PATCH, TUBE = 16, 2  # pixels, frames
_EPSILON = 1e-6
_WAVELENGTHS = 10_000
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Variant:
    """A published model: its channels, heads and blocks."""

    width: int
    heads: int
    depth: int


VARIANTS = {
    "videomae_small": Variant(384, 6, 12),
    "videomae_base": Variant(768, 12, 12),
    "videomae_large": Variant(1024, 16, 24),
}
N_FRAMES, SIDE = 16, 224  # that they were trained on


class Tubes(nn.Module):
    """Cuts a clip into tubes and projects each; the weights are those of a 3-D convolution."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        size = (TUBE, PATCH, PATCH)
        self.proj = nn.Conv3d(in_chans, dim, size, stride=size)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, frames · channels, height, width) → (B · tubes in time, tubes in space, C)."""
        _, _, height, width = clip.shape
        weight = self.proj.weight.transpose(1, 2).flatten(1, 2)  # (C, frames · channels, …)
        pairs = clip.reshape(-1, weight.shape[1], height, width)
        x = functional.conv2d(pairs, weight, self.proj.bias, stride=PATCH)
        return by_rows(x)


class VideoMAE(nn.Module):
    """A VideoMAE: clip (B, frames · channels, height, width) → (B, classes)."""

    num_prefix_tokens = 0
    grain = (PATCH, PATCH)

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 400,
        img_size: int | tuple[int, int] = SIDE,
        in_chans: int = 3,
        n_frames: int = N_FRAMES,
        depth: int | None = None,
    ) -> None:
        """Build a variant with PyTorch's own initial values.

        Args:
            variant: its sizes.
            num_classes: 0 leaves out the classifier, and the output is the normed mean.
            img_size: height and width in pixels, multiples of 16.
            in_chans: channels of a frame.
            n_frames: frames of a clip, an even number.
            depth: blocks; None is the variant's own.

        Raises: RewriteError if the clip does not divide into tubes.
        """
        from timm.models.vision_transformer import Block

        super().__init__()
        self.n_frames, self.frame_chans, self.num_classes = n_frames, in_chans, num_classes
        self.embed_dim = dim = variant.width
        self.patch_embed = Tubes(in_chans, dim)
        self.set_input_size((img_size, img_size) if isinstance(img_size, int) else img_size)
        norm = partial(nn.LayerNorm, eps=_EPSILON)
        self.blocks = nn.ModuleList(
            Block(dim, variant.heads, qkv_bias=True, norm_layer=norm)
            for _ in range(depth or variant.depth)
        )
        self.norm = nn.Identity()
        self.fc_norm = norm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Compute the positions for an image size, (height, width) in pixels.

        Raises: RewriteError if the clip does not divide into tubes.
        """
        height, width = img_size
        if height % PATCH or width % PATCH or self.n_frames % TUBE:
            raise RewriteError(
                f"VideoMAE cuts its clip into tubes of {TUBE} frames of {PATCH}×{PATCH} pixels, "
                f"which {self.n_frames} frames of {height}×{width} do not divide into."
            )
        self.img_size = img_size
        self.n_patches = self.n_frames // TUBE * (height // PATCH) * (width // PATCH)
        self.positions = _waves(self.n_patches, self.embed_dim)  # no weight

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(frames · channels, height, width)."""
        return (self.n_frames * self.frame_chans, *self.img_size)

    @property
    def n_read(self) -> None:
        """The head reads all tokens."""

    def embed(self, clip: Tensor) -> Tensor:
        """(B, frames · channels, height, width) → tokens, (B, N, C)."""
        tubes = self.patch_embed(clip)
        return cast(Tensor, tubes.reshape(-1, self.n_patches, self.embed_dim) + self.positions)

    def classify(self, x: Tensor, size: Tensor | None) -> Tensor:
        """Tokens (B, M, C), each of size (B, M, 1) or of 1 → (B, classes)."""
        pooled = x.mean(dim=1) if size is None else (x * size).sum(dim=1) / self.n_patches
        return cast(Tensor, self.head(self.fc_norm(pooled)))

    def forward_features(self, clip: Tensor) -> Tensor:
        """Compute the tokens, (B, N, C), before they are pooled."""
        x = self.embed(clip)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, clip: Tensor) -> Tensor:
        """Compute the network with all of its tokens."""
        return self.classify(self.forward_features(clip), None)


def _waves(n: int, dim: int) -> Tensor:
    """Return sines in even channels and cosines in odd ones, (1, n, dim), in memory always."""
    pairs = torch.arange(dim, device="cpu", dtype=torch.float64) // 2
    angles = torch.arange(n, device="cpu")[:, None] / _WAVELENGTHS ** (2 * pairs / dim)
    even = torch.arange(dim, device="cpu") % 2 == 0
    return torch.where(even, angles.sin(), angles.cos()).float()[None]


def register(timm: Any) -> None:
    """Add the variants to timm's registry."""
    configuration = {"input_size": (3 * N_FRAMES, SIDE, SIDE), "mean": _MEAN, "std": _STD}
    registry.register(timm, __name__, VideoMAE, VARIANTS, lambda v: configuration)
