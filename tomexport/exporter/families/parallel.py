"""ViTs of timm's with other blocks: attention and MLP side by side, or several, or differential.

- `ParallelScalingBlock`: attention and MLP have one residual. Tokens merge after it; what follows
  there in other blocks is nothing here.
- `ParallelThingsBlock`: several attentions, then several MLPs. Tokens are compared by all keys.
- `DiffAttention`, `DiffParallelScalingBlock`: two softmaxes, one subtracted from the other.

Sources: Dehghani et al., ViT-22B, ICML 2023; Touvron et al., Three things everyone should know
about Vision Transformers, ECCV 2022; Ye et al., Differential Transformer, ICLR 2025;
implementation: timm's vision_transformer.py and diff_attention.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tomexport.exporter.attention import attend
from tomexport.exporter.families import transformer, vit
from tomexport.exporter.families.family import Signals, Tokens, linear_macs, norm_elements
from tomexport.exporter.families.transformer import Call
from tomexport.plan import Cost, ModelCost, Step


@dataclass(frozen=True)
class _Form:
    """A form of blocks, as functions over one.

    Attributes:
        attention: the class of its attentions, as timm calls it.
        parts: block → the names of its attentions; none in blocks that attend themselves.
        fold: (block, how many blocks each layer is a part of) → folds scalings into weights.
        cost: what a call costs.
        attend: (block, tokens, n) → what the first n tokens (None: all) get, and signals of all.
        mlp: (call, x) → x after what follows the merge.
    """

    attention: str
    parts: Callable[[Any], tuple[str, ...]]
    fold: Callable[[Any, Counter[nn.Module]], None]
    cost: Callable[[Call], Cost]
    attend: Callable[[Any, Tokens, int | None], tuple[Tensor, Signals]]
    mlp: Callable[[Call, Tensor], Tensor]


def _form(block: Any) -> _Form | None:
    if type(block).__name__ in ("ParallelScalingBlock", "DiffParallelScalingBlock"):
        return _SIDE_BY_SIDE
    if type(block).__name__ == "ParallelThingsBlock":
        return _SEVERAL
    is_difference = type(getattr(block, "attn", None)).__name__ == _DIFFERENTIAL.attention
    return _DIFFERENTIAL if is_difference else None


def _known(block: Any) -> _Form:
    form = _form(block)
    assert form is not None
    return form


# --- the family


def _accepts(model: nn.Module) -> bool:
    blocks: Any = model.blocks if vit.accepts(model) else ()
    return any(_form(block) for block in blocks)


def _refusal(model: Any) -> str | None:
    import timm.layers

    first = next(block for block in model.blocks if _form(block))
    form = _known(first)
    attention = getattr(timm.layers, form.attention)
    blocks = transformer.refusal_of_blocks(model, (type(first),), (attention,), form.parts(first))
    return blocks or vit.refusal_beside_blocks(model)


def _fold(model: Any) -> None:
    blocks = list(dict.fromkeys(model.blocks))
    owners = transformer.owners_of_layers(blocks)
    for block in blocks:
        _known(block).fold(block, owners)


def _cost(model: Any, name: str) -> ModelCost:
    costs = [_known(call.block).cost(call) for call in _calls(model)]
    return transformer.cost(model, name, vit.stem(model), costs)


def _calls(model: Any, steps: Sequence[Step] = ()) -> Sequence[Call]:
    del steps
    uses = Counter(model.blocks)
    return tuple(Call(block, uses[block] == 1) for block in model.blocks)


def _attention(call: Call, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    out, signals = _known(call.block).attend(call.block, tokens, n_out if call.alone else None)
    return tokens.x[:, :n_out] + out[:, :n_out], signals


def _mlp(call: Call, x: Tensor) -> Tensor:
    return _known(call.block).mlp(call, x)


# --- what two forms share


def _projected(layer: Any, h: Tensor, first: int, n_out: int | None) -> tuple[Tensor, Tensor]:
    """Compute the first outputs of a layer, of n_out tokens or all, and the others, of all."""
    if n_out is None:
        left, right = torch.split(layer(h), [first, layer.out_features - first], dim=2)
        return left, right
    of_few, of_all = transformer.divided(layer, first)
    return of_few(h[:, :n_out]), of_all(h)


def _mixed(owner: Any, q: Tensor, kv: Tensor, tokens: Tokens) -> tuple[Tensor, Signals]:
    """Attend: queries (B, M, C), keys beside values (B, N, 2C) → (B, M, C)."""
    k, v = kv.chunk(2, dim=2)
    q, k = transformer.heads(q, owner.head_dim), transformer.heads(k, owner.head_dim)
    v = transformer.heads(v, v.shape[2] // owner.num_heads)
    queries, keys = owner.q_norm(q), owner.k_norm(k)
    bias = None if tokens.size is None else transformer.bias_of_size(tokens.size)
    if hasattr(owner, "sub_norm"):
        plus, minus = (
            attend(queries[:, i::2], keys[:, i::2], v, bias, owner.scale) for i in range(2)
        )
        out = owner.sub_norm(plus - owner._compute_lambda() * minus) * (1 - owner.lambda_init)
    else:
        out = attend(queries, keys, v, bias, owner.scale)
    return out.transpose(1, 2).flatten(2), Signals(keys=k, queries=q, values=v)


def _pair(owner: Any, width: int) -> int:
    """Products per pair of tokens: both softmaxes of a difference meet the values."""
    return (3 if hasattr(owner, "sub_norm") else 2) * width


def _norms(owner: Any, width: int) -> int:
    n_heads = width // owner.head_dim
    of_heads = norm_elements(owner.q_norm) + norm_elements(owner.k_norm)
    of_differences = norm_elements(getattr(owner, "sub_norm", None))
    return int(n_heads * of_heads + owner.num_heads * of_differences)


# --- attention and MLP side by side


def _fold_side_by_side(block: Any, owners: Counter[nn.Module]) -> None:
    hidden, width = block.in_split[:2]
    transformer.fold_scale(block, block.in_proj, width, hidden)
    last = [block.out_proj]
    if block.out_proj is None:
        last = [block.attn_out_proj, block.mlp_out_proj]
    transformer.fold_gain(block, "", last, owners)


def _cost_side_by_side(call: Call) -> Cost:
    block, products = call.block, linear_macs(call.block)
    width = block.in_split[1]
    kv = 2 * width * block.in_proj.in_features
    q_and_hidden = linear_macs(block.in_proj) - kv
    return Cost(
        before=products,
        pair=_pair(block, width),
        after=0,
        query=products - kv - (0 if call.alone else q_and_hidden),
        norm_before=norm_elements(block.in_norm) + _norms(block, width),
    )


def _side_by_side(block: Any, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    hidden, width = block.in_split[:2]
    h = block.in_norm(tokens.x)
    hidden_and_q, kv = _projected(block.in_proj, h, hidden + width, n_out)
    between, q = torch.split(hidden_and_q, [hidden, width], dim=2)
    mixed, signals = _mixed(block, q, kv, tokens)
    between = block.mlp_act(between if block.mlp_bias is None else between + block.mlp_bias)
    if block.out_proj is not None:
        out = block.out_proj(torch.cat([mixed, between], dim=2))
    else:
        out = block.attn_out_proj(mixed) + block.mlp_out_proj(between)
    return block.ls(out), signals


_SIDE_BY_SIDE = _Form(
    attention="Attention",
    parts=lambda block: (),
    fold=_fold_side_by_side,
    cost=_cost_side_by_side,
    attend=_side_by_side,
    mlp=lambda call, x: x,
)


# --- several attentions, several MLPs


def _fold_several(block: Any, owners: Counter[nn.Module]) -> None:
    for part in block.attns:
        transformer.fold_scale(part.attn, part.attn.qkv, part.attn.proj.in_features)
        transformer.fold_gain(part, "", [part.attn.proj], owners)
    for part in block.ffns:
        transformer.fold_gain(part, "", [getattr(part.mlp, "fc2", None)], owners)


def _cost_several(call: Call) -> Cost:
    block, attns = call.block, [part.attn for part in call.block.attns]
    qkv = sum(linear_macs(attn.qkv) for attn in attns)
    products = sum(map(linear_macs, attns))
    norms = sum(map(transformer.norms_of_attention, attns))
    return Cost(
        before=products,
        pair=sum(2 * attn.proj.in_features for attn in attns),
        after=linear_macs(block.ffns),
        query=products - (2 * qkv // 3 if call.alone else qkv),
        norm_before=norms + sum(norm_elements(part.norm) for part in block.attns),
        norm_after=norm_elements(block.ffns),
    )


def _several(block: Any, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    outs, signals = [], []
    for part in block.attns:
        h = part.norm(tokens.x)
        projected = transformer.project(part.attn, h, n_out)
        out, seen = transformer.attended(part.attn, h, projected, tokens)
        outs.append(part.ls(out))
        signals.append(seen)
    keys, queries, values = (
        torch.cat([cast(Tensor, getattr(seen, name)) for seen in signals], dim=1)
        for name in ("keys", "queries", "values")
    )
    return torch.stack(outs).sum(dim=0), Signals(keys=keys, queries=queries, values=values)


def _mlps(call: Call, x: Tensor) -> Tensor:
    return x + torch.stack([part(x) for part in call.block.ffns]).sum(dim=0)


_SEVERAL = _Form(
    attention="Attention",
    parts=lambda block: tuple(f"attns.{i}.attn" for i in range(len(block.attns))),
    fold=_fold_several,
    cost=_cost_several,
    attend=_several,
    mlp=_mlps,
)


# --- differential attention


def _fold_differential(block: Any, owners: Counter[nn.Module]) -> None:
    transformer.fold_scale(block.attn, block.attn.qkv, block.attn.proj.in_features)
    transformer.fold_gains(block, owners)


def _cost_differential(call: Call) -> Cost:
    block, attn = call.block, call.block.attn
    width = attn.proj.in_features
    norms = norm_elements(block.norm1) + norm_elements(attn.norm) + _norms(attn, width)
    usual = transformer.cost_of_block(call)
    return dataclasses.replace(usual, pair=_pair(attn, width), norm_before=norms)


def _differential(block: Any, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    attn = block.attn
    h = transformer.taken(block, 1, tokens.x)
    q, kv = _projected(attn.qkv, h, attn.proj.in_features, n_out)
    mixed, signals = _mixed(attn, q, kv, tokens)
    return transformer.given(block, 1, attn.proj(attn.norm(mixed))), signals


_DIFFERENTIAL = _Form(
    attention="DiffAttention",
    parts=lambda block: ("attn",),
    fold=_fold_differential,
    cost=_cost_differential,
    attend=_differential,
    mlp=transformer.mlp,
)

PARALLEL = transformer.family(
    "parallel",
    modules=(),  # those of vit.py, by their blocks
    accepts=_accepts,
    refusal=_refusal,
    signals=("keys", "queries", "values"),
    fold=_fold,
    cost=_cost,
    embed=vit.embed,
    calls=_calls,
    attention=_attention,
    mlp=_mlp,
)
