"""SReT, and SReT with merging, written a second time: shares no code with the package.

From the weights of a state dict, one image at a time, head by head and slice by slice, in float64.
Merging follows the slides' rule token by token; tokens come back before they are pooled, in the
last stage too, where the package weighs by size instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

CALLS = (4, 10, 6)
SLICED = ((8, 2), (4, 1), (1, 1))


@dataclass
class Result:
    """What was computed: the output, and each merge's slots, sizes and first patches."""

    logits: Tensor
    targets: list[list[int]] = field(default_factory=list)
    sizes_at_stage_ends: list[list[float]] = field(default_factory=list)
    first_patches: list[list[int]] = field(default_factory=list)


def forward(
    state: dict[str, Tensor],
    image: Tensor,
    heads: tuple[int, ...],
    slices: tuple[tuple[int, int], ...] = SLICED,
    removals: list[int] | None = None,
    *,
    seed: int = 0,
    prop_attn: bool = True,
    groups_of: Callable[[int, Tensor, int], list[list[int]]] | None = None,
) -> Result:
    """Run one image (3, H, W); removals are the tokens that go at each of the 20 calls.

    Which tokens become one say `groups_of`: (call, keys (N, D), how many go) → groups, which ToMe
    makes unless others are given.
    """
    w = {name: tensor.double() for name, tensor in state.items()}
    removals = list(removals or [0] * sum(CALLS))
    result = Result(torch.empty(0))
    grid = _stem(w, image.double()[None])[0] + w["pos_embed"][0]  # (C, rows, columns)
    for stage, n_calls in enumerate(CALLS):
        if stage:
            kernel = w[f"pools.{stage - 1}.conv.weight"]
            grid = functional.conv2d(
                grid[None], kernel, w[f"pools.{stage - 1}.conv.bias"], 2, 1, groups=len(kernel) // 2
            )[0]
        channels, rows, columns = grid.shape
        places = [(y, x) for y in range(rows) for x in range(columns)]
        tokens = torch.stack([grid[:, y, x] for y, x in places])
        sizes, owner = [1.0] * len(tokens), list(range(len(tokens)))
        merged = False
        for call in range(n_calls):
            shared = f"transformers.{stage}.blocks.{call // 2 * 4}."
            n_slices, r = slices[stage][call % 2], removals.pop(0)
            reorder = call % 2 == 1 and n_slices > 1
            out, keys = _attention(
                w, shared, _norm(w, f"{shared}norm1", tokens), heads[stage], n_slices,
                seed if reorder else None, sizes if merged and prop_attn else None,
            )  # fmt: skip
            tokens = w[f"{shared}coefficient1.bias"] * tokens
            tokens = tokens + w[f"{shared}coefficient2.bias"] * out
            if r:
                merged = True
                index = sum(CALLS[:stage]) + call
                groups = groups_of(index, keys, r) if groups_of else _by_parity(keys, r)
                tokens, sizes, target = _merge(tokens, sizes, groups)
                owner = [target[slot] for slot in owner]
                result.targets.append(target)
                result.first_patches.append([owner.index(slot) for slot in range(len(tokens))])
            tokens = w[f"{shared}coefficient3.bias"] * tokens + w[
                f"{shared}coefficient4.bias"
            ] * _mlp(w, f"{shared}mlp", _norm(w, f"{shared}norm2", tokens))
            extra = f"transformers.{stage}.blocks.{2 * call + 1}."
            tokens = w[f"{extra}coefficient1.bias"] * tokens + w[
                f"{extra}coefficient2.bias"
            ] * _mlp(w, f"{extra}mlp", _norm(w, f"{extra}norm1", tokens))
        result.sizes_at_stage_ends.append(sizes)
        grid = torch.empty(channels, rows, columns, dtype=torch.float64)
        for (y, x), slot in zip(places, owner, strict=True):
            grid[:, y, x] = tokens[slot]
    pooled = grid.mean((1, 2))
    normed = _norm(w, "norm", pooled[None])
    result.logits = (normed @ w["head.weight"].T + w["head.bias"])[0]
    return result


def _stem(w: dict[str, Tensor], x: Tensor) -> Tensor:
    for i in "123":
        x = functional.conv2d(x, w[f"patch_embed.conv{i}.weight"], stride=2, padding=1)
        parts = ("bn{}.running_mean", "bn{}.running_var", "bn{}.weight", "bn{}.bias")
        mean, variance, weight, bias = (w["patch_embed." + p.format(i)] for p in parts)
        x = x + w[f"patch_embed.conv{i}.bias"][:, None, None]
        x = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
        x = (x * weight[:, None, None] + bias[:, None, None]).clamp(min=0)
    return x


def _norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def _mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x @ w[f"{name}.fc1.weight"].T + w[f"{name}.fc1.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x @ w[f"{name}.fc2.weight"].T + w[f"{name}.fc2.bias"]


def _attention(
    w: dict[str, Tensor], name: str, x: Tensor, n_heads: int, n_slices: int,
    seed: int | None, sizes: list[float] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output and the keys' mean over the heads, in the order of x."""
    n, dim = x.shape
    order = list(range(n))
    if seed is not None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    reordered = x[order]
    qkv = reordered @ w[f"{name}attn.qkv.weight"].T + w[f"{name}attn.qkv.bias"]
    width, run = dim // n_heads, n // n_slices
    out, keys = torch.empty_like(x), torch.zeros(n, width, dtype=torch.float64)
    for head in range(n_heads):
        columns = slice(head * width, (head + 1) * width)
        q, k, v = (part[:, columns] for part in qkv.split(dim, dim=1))
        keys += k / n_heads
        for start in range(0, n, run):
            inside = slice(start, start + run)
            weights = torch.exp(q[inside] @ k[inside].T / math.sqrt(width))
            if sizes is not None:
                weights = weights * torch.tensor([sizes[t] for t in order[inside]]).double()
            out[inside, columns] = weights / weights.sum(1, keepdim=True) @ v[inside]
    back_out, back_keys = torch.empty_like(out), torch.empty_like(keys)
    for place, token in enumerate(order):
        back_out[token], back_keys[token] = out[place], keys[place]
    projected = back_out @ w[f"{name}attn.proj.weight"].T + w[f"{name}attn.proj.bias"]
    return projected, back_keys


def _by_parity(keys: Tensor, r: int) -> list[list[int]]:
    n = len(keys)
    unit = keys / keys.square().sum(1, keepdim=True).sqrt()
    a, b = list(range(0, n, 2)), list(range(1, n, 2))
    rows = (unit[a] @ unit[b].T).tolist()
    best = {i: max(row) for i, row in zip(a, rows, strict=True)}
    partner = {i: b[row.index(max(row))] for i, row in zip(a, rows, strict=True)}
    sources = sorted(a, key=lambda i: (-best[i], i))[:r]
    groups = {t: [t] for t in range(n) if t not in set(sources)}
    for i in sources:
        groups[partner[i]].append(i)
    return list(groups.values())


def _merge(
    tokens: Tensor, sizes: list[float], groups: list[list[int]]
) -> tuple[Tensor, list[float], list[int]]:
    ordered = sorted(groups, key=min)
    weights = [sum(sizes[t] for t in group) for group in ordered]
    means = [
        sum(tokens[t] * sizes[t] for t in group) / weight
        for group, weight in zip(ordered, weights, strict=True)
    ]
    slot = {t: place for place, group in enumerate(ordered) for t in group}
    return torch.stack(means), weights, [slot[t] for t in range(len(tokens))]
