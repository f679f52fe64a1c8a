"""What tomexport is compared with: timm's own export, a naive export of ToMe, and a slice export.

ToMe is written here from the paper (Bolya et al., ICLR 2023) in the way that it is written most
often, argsort, gather and scatter_add in patched timm blocks, and shares no code with the package.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

# (x, size or None, metric (B, N, D), r) → (x, size) of N − r tokens
Reduce = Callable[[Tensor, "Tensor | None", Tensor, int], tuple[Tensor, Tensor]]


class Blocks(nn.Module):
    """timm's blocks with tokens reduced between attention and MLP, r of them at each."""

    def __init__(self, blocks: nn.Module, removed: Sequence[int], reduce: Reduce) -> None:
        super().__init__()
        self.blocks = blocks
        self.removed = removed
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks: (B, N, C) → (B, N − Σr, C)."""
        size: Tensor | None = None
        blocks: Any = self.blocks
        for block, r in zip(blocks, self.removed, strict=True):
            out, metric = attend(block.attn, block.norm1(x), size)
            x = x + block.ls1(out)
            if r:
                x, size = self.reduce(x, size, metric, r)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x


def attend(attn: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Proportional attention; also returns the keys' mean over the heads, (B, N, D)."""
    n_batch, n, n_channels = x.shape
    qkv = attn.qkv(x).reshape(n_batch, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B, H, N, D) each
    scores = (q * attn.scale) @ k.transpose(-2, -1)
    if size is not None:
        scores = scores + size.log()[:, None, None, :, 0]
    out = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(n_batch, n, n_channels)
    return attn.proj(out), k.mean(dim=1)


def merge(x: Tensor, size: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge the r tokens of the even positions that are most like one of the odd positions."""
    if size is None:
        size = torch.ones_like(x[..., :1])
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -math.inf  # the class token stays
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    sources, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    partner = partner.gather(1, sources)

    def combine(tokens: Tensor) -> Tensor:
        even, odd = tokens[:, ::2], tokens[:, 1::2]
        width = tokens.shape[-1]
        merged = even.gather(1, sources[..., None].expand(-1, -1, width))
        odd = odd.scatter_add(1, partner[..., None].expand(-1, -1, width), merged)
        return torch.cat([even.gather(1, kept[..., None].expand(-1, -1, width)), odd], dim=1)

    total = combine(size)
    return combine(x * size) / total, total


def cut(x: Tensor, size: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Keep the first N − r tokens; a constant size keeps the bias of the attention."""
    del size, metric
    n = x.shape[1]
    return x[:, : n - r], x.new_full((1, n - r, 1), n / (n - r))


def patched(model: nn.Module, removed: Sequence[int], reduce: Reduce) -> nn.Module:
    """Return a copy of a timm model whose blocks reduce tokens."""
    copied = copy.deepcopy(model)
    copied.blocks = Blocks(cast(nn.Module, copied.blocks), removed, reduce)
    return copied.eval()


def to_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """Export a module as a user of PyTorch would, into one file."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (images,), path, dynamo=True, external_data=False, verbose=False,
            input_names=["image"], output_names=["logits"],
        )  # fmt: skip
