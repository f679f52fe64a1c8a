"""Softmax attention, in the form that each use of it wants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute softmax attention, (B, H, N, D) each; bias (B, 1 or H, 1 or N, N), of keys or pairs.

    Fused in PyTorch; written out for export, where the fused form with a bias fails (torch 2.13).
    """
    if torch.onnx.is_in_onnx_export():
        scores = (q if scale == 1 else q * scale) @ k.mT  # (B, H, N, N)
        scores = scores if bias is None else scores + bias
        return scores.softmax(dim=-1) @ v
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def class_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return what the first query of each head attends to, (B, H, N); arguments as in `attend`."""
    scores = (q[:, :, :1] * scale) @ k.mT  # (B, H, 1, N)
    scores = scores if bias is None else scores + bias[:, :, :1]
    return scores.softmax(dim=-1)[:, :, 0]
