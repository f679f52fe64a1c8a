"""Merging in families other than the plain ViT, a second time: token by token, head by head.

Shares the merge with `tome_by_hand`, and no code with the package. Every token carries the place
that it stands in: that of the token it was merged into, which leads its slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.exporter import tome_by_hand


class State(NamedTuple):
    """The tokens (N, C), their sizes, and their places."""

    x: Tensor
    sizes: list[float]
    places: list[int]


class Seen(NamedTuple):
    """What a block did before its MLP.

    Attributes:
        x: (N, C), after the attention.
        keys, queries, values: (N, heads, D), as projected.
        maps: (heads, N, N), what each head attends to; empty where that is no softmax.
        normed: (N, C), what was projected.
        mlp: the rest of the block.
    """

    x: Tensor
    keys: Tensor
    queries: Tensor
    values: Tensor
    maps: list[Tensor]
    normed: Tensor
    mlp: Callable[[Tensor], Tensor]


def forward(
    model: Any, image: Tensor, removals: list[int], seen: list[Seen] | None = None
) -> Tensor:
    """Run one image (1, 3, H, W) through a model of timm's, merging as it goes.

    What each block did is put into `seen`.
    """
    x = EMBED[type(model).__name__](model, image)[0]
    state = State(x, [1.0] * len(x), list(range(len(x))))
    for index, (block, r) in enumerate(zip(model.blocks, removals, strict=True)):
        done = BLOCKS[type(block).__name__](model, index, block, state)
        if seen is not None:
            seen.append(done)
        state = _merged(state._replace(x=done.x), done.keys.mean(1), r, model.num_prefix_tokens)
        state = state._replace(x=done.mlp(state.x))
    return _head(model, state)


def _merged(state: State, keys: Tensor, r: int, n_prefix: int) -> State:
    r = min(r, (len(state.x) - n_prefix) // 2)
    if r <= 0:
        return state
    x, sizes, groups = tome_by_hand.merge(state.x, state.sizes, keys, r, n_prefix)
    return State(x, sizes, [state.places[group[0]] for group in groups])


def _head(model: Any, state: State) -> Tensor:
    x, sizes, n_prefix = model.norm(state.x), torch.tensor(state.sizes), model.num_prefix_tokens
    if model.global_pool == "avg":
        weights = sizes[n_prefix:, None]
        pooled = (x[n_prefix:] * weights).sum(0) / weights.sum()
    elif model.global_pool == "map":  # each token as often as its size
        copies = [t for t, size in zip(x, state.sizes, strict=True) for _ in range(round(size))]
        pooled = model.attn_pool(torch.stack(copies)[None])[0]
    else:
        pooled = x[0]
    return model.head(model.fc_norm(pooled))[None]


# --- embedding


def _eva_embed(model: Any, image: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(image))[0])


def _plain_embed(model: Any, image: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(image)))


def _bare_embed(model: Any, image: Tensor) -> Tensor:
    x = model.patch_embed(image)
    if model.cls_token is not None:
        x = torch.cat([model.cls_token, x], dim=1)
    return x if getattr(model, "pos_embed", None) is None else x + model.pos_embed


EMBED = {
    "Eva": _eva_embed,
    "Beit": _bare_embed,
    "VisionTransformerRelPos": _bare_embed,
    "VisionTransformer": _plain_embed,
}


# --- attention


def _softmax(q: Tensor, k: Tensor, sizes: list[float], bias: Tensor | float = 0.0) -> Tensor:
    scores = torch.exp(q @ k.T / math.sqrt(q.shape[1]) + bias) * torch.tensor(sizes)
    return scores / scores.sum(1, keepdim=True)


def _turned(x: Tensor, places: list[int], table: Tensor, n_prefix: int, half: bool) -> Tensor:
    """Rotate each token of x (N, D), pair by pair, by the row of its place; not the prefix."""
    d = x.shape[1]
    pairs = (
        [(i, i + d // 2) for i in range(d // 2)] if half else [(i, i + 1) for i in range(0, d, 2)]
    )
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    out = x.clone()
    for token, place in enumerate(places):
        if place < n_prefix:
            continue
        sine, cosine = table[place - n_prefix, :d], table[place - n_prefix, d:]
        a, b = x[token, first], x[token, second]
        out[token, first] = a * cosine[first] - b * sine[first]
        out[token, second] = b * cosine[second] + a * sine[second]
    return out


def _projected(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, (N, heads, D) each, whatever the class of timm's attention."""
    width = attn.proj.in_features // attn.num_heads
    if attn.qkv is None:
        parts = [attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)]
    else:
        parts = list(torch.nn.functional.linear(h, attn.qkv.weight, attn.qkv.bias).chunk(3, 1))
        if getattr(attn, "q_bias", None) is not None:
            parts = [parts[0] + attn.q_bias, parts[1], parts[2] + attn.v_bias]
    q, k, v = (part.reshape(len(h), -1, width) for part in parts)
    return q, k, v


def _part(owner: Any, name: str) -> Callable[[Tensor], Tensor]:
    return getattr(owner, name, None) or torch.nn.Identity()


def _gain(block: Any, index: int, out: Tensor) -> Tensor:
    gamma = getattr(block, f"gamma_{index}", None)
    return out * gamma if gamma is not None else _part(block, f"ls{index}")(out)


def _eva(model: Any, index: int, block: Any, state: State) -> Seen:
    attn, n_prefix = block.attn, model.num_prefix_tokens
    turns = model.rope.get_embed(shape=list(model.patch_embed.grid_size))
    turns = turns[index] if model.rope_mixed else turns[None].expand(attn.num_heads, -1, -1)
    h = block.norm1(state.x)
    q, k, v = _projected(attn, h)
    maps, heads = [], []
    for head in range(attn.num_heads):
        shared = head * k.shape[1] // attn.num_heads  # of the heads of keys and values
        rotate = state.places, turns[head], n_prefix, attn.rotate_half
        query = _turned(attn.q_norm(q[:, head]), *rotate)
        key = _turned(attn.k_norm(k[:, shared]), *rotate)
        maps.append(_softmax(query, key, state.sizes))
        heads.append(maps[-1] @ v[:, shared])
    out = attn.proj(_part(attn, "norm")(torch.cat(heads, 1)))
    return Seen(state.x + _gain(block, 1, out), k, q, v, maps, h, _mlp_first_norm(block))


def _relative(model: Any, index: int, block: Any, state: State) -> Seen:
    attn = block.attn
    post = type(block).__name__.startswith("ResPost")
    h = state.x if post else block.norm1(state.x)
    q, k, v = _projected(attn, h)
    bias = _bias(model, attn)  # (heads, all, all)
    places = torch.tensor(state.places)
    maps, heads = [], []
    for head in range(attn.num_heads):
        of_pairs = bias[head][places][:, places]
        query, key = _part(attn, "q_norm")(q[:, head]), _part(attn, "k_norm")(k[:, head])
        maps.append(_softmax(query, key, state.sizes, of_pairs))
        heads.append(maps[-1] @ v[:, head])
    out = attn.proj(torch.cat(heads, 1))
    if post:
        x, mlp = state.x + block.norm1(out), lambda x: x + block.norm2(block.mlp(x))
    else:
        x, mlp = state.x + _gain(block, 1, out), _mlp_first_norm(block)
    return Seen(x, k, q, v, maps, h, mlp)


def _bias(model: Any, attn: Any) -> Tensor:
    if hasattr(attn, "_get_rel_pos_bias"):
        return attn._get_rel_pos_bias()[0]
    return (attn.rel_pos or model.shared_rel_pos).get_bias()[0]


def _mlp_first_norm(block: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x + _gain(block, 2, block.mlp(block.norm2(x)))


def _side_by_side(model: Any, index: int, block: Any, state: State) -> Seen:
    """One residual of both, and nothing after the merge; with two softmaxes if it has them."""
    h = block.in_norm(state.x)
    hidden, q, k, v = block.in_proj(h).split(block.in_split, dim=1)
    mixed, of_heads = _mixed(block, q, k, v, state.sizes)
    if block.mlp_bias is not None:
        hidden = hidden + block.mlp_bias
    hidden = block.mlp_act(hidden)
    if block.out_proj is not None:
        out = block.out_proj(torch.cat([mixed, hidden], 1))
    else:
        out = block.attn_out_proj(mixed) + block.mlp_out_proj(hidden)
    return Seen(state.x + block.ls(out), *of_heads, [], h, lambda x: x)


def _mixed(
    owner: Any, q: Tensor, k: Tensor, v: Tensor, sizes: list[float]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return what is attended to, (N, C), and keys, queries and values, (N, heads, D)."""
    n_softmaxes = 2 if hasattr(owner, "sub_norm") else 1
    q, k = (y.reshape(len(y), owner.num_heads, n_softmaxes, -1) for y in (q, k))
    v = v.reshape(len(v), owner.num_heads, -1)
    heads = []
    for head in range(owner.num_heads):
        maps = [
            _softmax(owner.q_norm(q[:, head, i]), owner.k_norm(k[:, head, i]), sizes)
            for i in range(n_softmaxes)
        ]
        if n_softmaxes == 1:
            heads.append(maps[0] @ v[:, head])
        else:
            difference = (maps[0] - owner._compute_lambda() * maps[1]) @ v[:, head]
            heads.append(owner.sub_norm(difference) * (1 - owner.lambda_init))
    return torch.cat(heads, 1), (k.flatten(1, 2), q.flatten(1, 2), v)


def _differential(model: Any, index: int, block: Any, state: State) -> Seen:
    attn, h = block.attn, block.norm1(state.x)
    mixed, of_heads = _mixed(attn, *attn.qkv(h).chunk(3, 1), state.sizes)
    x = state.x + block.ls1(attn.proj(attn.norm(mixed)))
    return Seen(x, *of_heads, [], h, _mlp_first_norm(block))


def _several(model: Any, index: int, block: Any, state: State) -> Seen:
    x, of_parts = state.x, []
    for part in block.attns:
        qkv = part.attn.qkv(part.norm(state.x)).chunk(3, 1)
        mixed, of_heads = _mixed(part.attn, *qkv, state.sizes)
        x = x + part.ls(part.attn.proj(mixed))
        of_parts.append(of_heads)
    of_heads = (torch.cat(each, 1) for each in zip(*of_parts, strict=True))
    return Seen(x, *of_heads, [], state.x, lambda x: x + sum(part(x) for part in block.ffns))


def _block(model: Any, index: int, block: Any, state: State) -> Seen:
    """Two of timm's modules have a class of this name."""
    form = _relative if hasattr(block.attn, "_get_rel_pos_bias") else _differential
    return form(model, index, block, state)


BLOCKS: dict[str, Callable[..., Any]] = {
    "Block": _block,
    "EvaBlock": _eva,
    "RelPosBlock": _relative,
    "ResPostRelPosBlock": _relative,
    "ParallelScalingBlock": _side_by_side,
    "DiffParallelScalingBlock": _side_by_side,
    "ParallelThingsBlock": _several,
}
