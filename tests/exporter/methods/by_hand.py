"""A plain ViT written a second time, one image at a time, for methods to be written into by hand.

Shares no code with the package: attention is written out, head by head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Block:
    """What a rule written by hand sees at a block.

    Attributes:
        index: of the block.
        x: (N, C), the tokens.
        given: (N, C), what the block was given.
        h: (N, C), its first norm.
        attention: (H, N, N), after the softmax.
        q, k, v: (H, N, D).
        sizes: (N,), to be kept up by the rule; all ones at first.
    """

    index: int
    x: Tensor
    given: Tensor
    sizes: Tensor
    h: Tensor = field(default_factory=lambda: torch.empty(0))
    attention: Tensor = field(default_factory=lambda: torch.empty(0))
    q: Tensor = field(default_factory=lambda: torch.empty(0))
    k: Tensor = field(default_factory=lambda: torch.empty(0))
    v: Tensor = field(default_factory=lambda: torch.empty(0))


# block → (tokens, sizes) that are left
Rule = Callable[[Block], tuple[Tensor, Tensor]]


def _stay(block: Block) -> tuple[Tensor, Tensor]:
    return block.x, block.sizes


def forward(
    model: Any,
    image: Tensor,
    *,
    before: Rule = _stay,
    between: Rule = _stay,
    biased: bool = False,
    finally_: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Run one image (1, 3, H, W) through a timm ViT.

    Args:
        model: the ViT.
        image: the image.
        before: what happens to the tokens before each block.
        between: what happens between attention and MLP.
        biased: whether the logarithms of the sizes enter the attention.
        finally_: what happens to the tokens, (N, C), after the last block.

    Returns:
        (1, classes).
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))[0]  # (N, C)
    sizes = torch.ones(len(x))
    for index, block in enumerate(model.blocks):
        x, sizes = before(Block(index, x, x, sizes))
        seen = Block(index, x, x, sizes)
        _attend(block, seen, biased)
        x, sizes = between(seen)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(finally_(x))[None])


def _attend(block: Any, seen: Block, biased: bool) -> None:
    attn, x = block.attn, seen.x
    seen.h = block.norm1(x)
    qkv = attn.qkv(seen.h).reshape(len(x), 3, attn.num_heads, attn.head_dim)
    seen.q, seen.k, seen.v = qkv.permute(1, 2, 0, 3)
    maps, outs = [], []
    for q, k, v in zip(seen.q, seen.k, seen.v, strict=True):
        scores = attn.q_norm(q) @ attn.k_norm(k).T * attn.head_dim**-0.5
        if biased:
            scores = scores + seen.sizes.log()
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        maps.append(weights)
        outs.append(weights @ v)
    seen.attention = torch.stack(maps)
    seen.x = x + block.ls1(attn.proj(attn.norm(torch.cat(outs, 1))))


def squeezed(x: Tensor, scores: list[float], n: int) -> Tensor:
    """Keep the n patches of the highest scores; each other joins the one most like it (TPS)."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    patches = x[1:]
    rows = [[(math.e, patches[i])] for i in ranked[:n]]
    for i in ranked[n:]:
        alike = [_cosine(patches[i], patches[j]) for j in ranked[:n]]
        rows[alike.index(max(alike))].append((math.exp(max(alike)), patches[i]))
    means = [sum(w * row for w, row in each) / sum(w for w, _ in each) for each in rows]
    return torch.stack([x[0], *means])


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / ((a.norm() + 1e-6) * (b.norm() + 1e-6)))
