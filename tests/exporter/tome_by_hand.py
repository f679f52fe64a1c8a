"""ToMe written a second time, token by token in plain Python: shares no code with the package.

Follows the rule of the paper's implementation: sets by parity of the current position, class token
never a source, distillation token never a destination, unmerged tokens of A in ascending order,
then B; with a distillation token the output is [class, distillation, rest of A, rest of B].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def forward(
    model: Any, image: Tensor, removals: list[int], prop_attn: bool = True, tokens: bool = False
) -> Tensor:
    """Run one image (1, 3, H, W) through a plain timm ViT, merging as it goes.

    With `tokens`, each patch gets what the token that it ended in holds after the norm, (1, N, C).
    """
    x = model._pos_embed(model.patch_embed(image))[0]  # (N, C)
    x = model.norm_pre(x)
    sizes: list[float] | None = None
    members = [[i] for i in range(len(x))]
    for block, r in zip(model.blocks, removals, strict=True):
        out, keys = _attention(block, x, sizes if prop_attn else None)
        x = x + block.ls1(out)
        r = min(r, (len(x) - model.num_prefix_tokens) // 2)
        if r > 0:
            x, sizes, groups = merge(x, sizes or [1.0] * len(x), keys, r, model.num_prefix_tokens)
            members = [[each for i in group for each in members[i]] for group in groups]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if tokens:
        found = {patch: x[slot] for slot, group in enumerate(members) for patch in group}
        return torch.stack([found[i] for i in range(model.num_prefix_tokens, len(found))])[None]
    if model.global_pool == "avg":
        prefix = model.num_prefix_tokens
        weights = torch.tensor(sizes or [1.0] * len(x))[prefix:, None]
        pooled = (x[prefix:] * weights).sum(0) / weights.sum()
        return model.head(model.fc_norm(pooled))[None]
    return model.forward_head(x[None])


def _attention(block: Any, x: Tensor, sizes: list[float] | None) -> tuple[Tensor, Tensor]:
    attn = block.attn
    n = len(x)
    qkv = attn.qkv(block.norm1(x)).reshape(n, 3, attn.num_heads, attn.head_dim)
    heads = []
    for head in range(attn.num_heads):
        q, k = attn.q_norm(qkv[:, 0, head]), attn.k_norm(qkv[:, 1, head])
        scores = torch.exp((q @ k.T) * attn.head_dim**-0.5)
        if sizes is not None:
            scores = scores * torch.tensor(sizes)
        heads.append(scores / scores.sum(1, keepdim=True) @ qkv[:, 2, head])
    return attn.proj(attn.norm(torch.cat(heads, 1))), qkv[:, 1].mean(1)


def merge(
    x: Tensor, sizes: list[float], keys: Tensor, r: int, n_prefix: int
) -> tuple[Tensor, list[float], list[list[int]]]:
    """Return tokens, sizes, and the old positions of what each is of, the one that stays first."""
    n = len(x)
    unit = [key / key.square().sum().sqrt() for key in keys]
    a = [i for i in range(n_prefix, n) if i % 2 == 0]
    b = [j for j in range(n_prefix, n) if j % 2 == 1]
    similarity = torch.stack([unit[i] for i in a]) @ torch.stack([unit[j] for j in b]).T
    rows = similarity.tolist()
    best = {i: max(row) for i, row in zip(a, rows, strict=True)}
    partner = {i: b[row.index(max(row))] for i, row in zip(a, rows, strict=True)}
    ranked = sorted(a, key=lambda i: (-best[i], i))
    sources, kept = ranked[:r], ranked[r:]
    if n_prefix:
        kept = sorted(kept)
    tokens, new_sizes, groups = [], [], []
    for position in [*range(n_prefix), *kept, *b]:
        group = [position, *(i for i in sources if partner[i] == position)]
        weight = sum(sizes[i] for i in group)
        tokens.append(sum(x[i] * sizes[i] for i in group) / weight)
        new_sizes.append(weight)
        groups.append(group)
    return torch.stack(tokens), new_sizes, groups
