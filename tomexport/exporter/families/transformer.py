"""What timm's vision transformers share: blocks, costs, what is refused, heads.

timm has several classes of blocks and attentions, with other names for the same parts. They are
read here by the parts that they have, so that a family says only where its tokens come from and
what its attention reads of places. timm's submodules are called as they are.

Modifications to timm's forward, all of them exact while nothing has merged:
- the block is split between attention and MLP, where tokens merge;
- keys are handed out before qk-norm and rotation, where ToMe takes them;
- attention adds log(size) to the scores of each key (proportional attention);
- attention that reads places reads those of `Tokens.place` (`positions.py`);
- average pooling is weighted by size, attention pooling adds log(size) to its scores;
- where only the class token is read, the last block computes no other.

A block may be called more than once (recursive models): then its weights are stored once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tomexport.exporter.attention import attend, class_attention
from tomexport.exporter.families.family import (
    Family,
    Signals,
    Tokens,
    linear_macs,
    norm_elements,
    scale_rows,
)
from tomexport.exporter.families.positions import Relative, Rotary
from tomexport.plan import Cost, ModelCost, Site, Step

# blocks that norm what a branch gives, not what it takes
_NORM_LAST = ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm")


class Call(NamedTuple):
    """A call of a block.

    Attributes:
        block: what is called.
        alone: whether it is the only call that computes with these queries, keys and values.
    """

    block: Any
    alone: bool


@dataclass(frozen=True)
class Stem:
    """What comes before the blocks.

    Attributes:
        n_patches: tokens that it makes.
        macs: its products.
        normalised: elements that it normalises.
    """

    n_patches: int
    macs: int
    normalised: int = 0


def family(
    name: str,
    *,
    modules: tuple[str, ...],
    accepts: Callable[[nn.Module], bool],
    refusal: Callable[[nn.Module], str | None],
    **other: Any,
) -> Family:
    """Return a family whose models are as most of timm's, but for the parts given."""
    usual: dict[str, Any] = {
        "signals": ("keys", "queries", "values", "normed", "class_attention"),
        "prepare": prepare,
        "fold": fold,
        "cost": lambda model, said: cost(model, said, conv_stem(model)),
        "input_shape": _input_shape,
        "grain": lambda model: model.patch_embed.feat_ratio(as_scalar=False),
        "resize": _resize,
        "output": _output,
        "n_read": n_read,
        "calls": calls,
        "attention": attention,
        "mlp": mlp,
        "head": lambda model, x, size: head(model, x, size, model.patch_embed.num_patches),
    }
    return Family(name, modules, accepts=accepts, refusal=refusal, **(usual | other))


# --- what is refused


def refusal_of_blocks(
    model: Any, known: Sequence[type], attentions: Sequence[type], parts: Sequence[str] = ("attn",)
) -> str | None:
    """Return why a block cannot be computed as it is known here, or None.

    Args:
        model: with `blocks`.
        known: classes of blocks.
        attentions: classes of attentions.
        parts: names of the attentions inside a block; empty for blocks that attend themselves.
    """
    if not len(model.blocks):
        return "it has no blocks."
    for index, block in enumerate(model.blocks):
        if type(block) not in known:
            return (
                f"block {index} is a {type(block).__name__}, whose order of attention, norms and "
                f"MLP may be another; known here: {_names(known)}."
            )
        for part in parts:
            if type(attn := block.get_submodule(part)) not in attentions:
                return (
                    f"the attention of block {index} is a {type(attn).__name__}, whose set of keys "
                    f"is not known; known here: {_names(attentions)}."
                )
        for name, module in block.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return (
                    f"block {index} has a forward hook on {name or 'itself'}, which the reduced "
                    "module would drop; remove the hook first."
                )
    return None


def _names(classes: Sequence[type]) -> str:
    return ", ".join(each.__name__ for each in classes)


def refusal_of_pooling(model: Any) -> str | None:
    """Return why its pooling is not known over merged tokens, or None."""
    from timm.layers import AttentionPoolLatent

    if model.global_pool not in ("token", "avg", "map"):
        return (
            f"its pooling is {model.global_pool!r}; over merged tokens only 'token', 'avg' and "
            "'map' are known to give what they give over all tokens."
        )
    pool: Any = getattr(model, "attn_pool", None)
    if model.global_pool == "map" and (
        type(pool) is not AttentionPoolLatent or pool.pos_embed is not None
    ):
        return "its attention pool is not the position-free AttentionPoolLatent."
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        return "it drops patches at random (patch_drop_rate); build it without."
    return None


def refusal_of_patches(model: Any, known: Sequence[type]) -> str | None:
    """Return why its tokens are not known before it runs, or None."""
    if type(model.patch_embed) not in known:
        return (
            f"its patch embedding is a {type(model.patch_embed).__name__}, not of a known class: "
            f"{_names(known)}."
        )
    if model.patch_embed.img_size is None:
        return "it has no fixed image size, so its token counts are not known before it runs."
    return None


# --- setting up, folding


def prepare(model: Any) -> None:
    """Set up a private copy: attention pools that take a bias, biases in one place."""
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool.fused_attn = False  # the fused form does not export with a size bias
    for attn in _attentions(model.blocks):
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]).detach()
            attn.qkv.bias, attn.q_bias = nn.Parameter(bias), None


def _attentions(blocks: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(block.attn for block in blocks if hasattr(block, "attn")))


def fold(model: Any) -> None:
    """Fold the scale of queries, and LayerScale, into weights that nothing else uses."""
    blocks = list(dict.fromkeys(model.blocks))
    owners = owners_of_layers(blocks)
    for attn in _attentions(blocks):
        fold_scale(attn, attn.q_proj if attn.qkv is None else attn.qkv, attn.proj.in_features)
    for block in blocks:
        fold_gains(block, owners)


def owners_of_layers(blocks: Iterable[nn.Module]) -> Counter[nn.Module]:
    """Return how many of the blocks each layer is a part of."""
    return Counter(layer for block in blocks for layer in block.modules())


def fold_scale(attn: Any, layer: nn.Linear, n_rows: int, first: int = 0) -> None:
    """Fold the scale of the scores into the rows of a layer that give queries."""
    if not isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity):
        return
    rows = torch.ones(layer.out_features)
    rows[first : first + n_rows] = attn.scale
    scale_rows(layer, rows)
    attn.scale = 1.0


def fold_gains(block: Any, owners: Counter[nn.Module]) -> None:
    """Fold what both branches of a block are multiplied by."""
    if type(block).__name__ not in _NORM_LAST:
        fold_gain(block, "1", [block.attn.proj], owners)
        fold_gain(block, "2", [getattr(block.mlp, "fc2", None)], owners)


def fold_gain(
    block: Any, index: str, layers: Sequence[nn.Module | None], owners: Counter[nn.Module]
) -> None:
    """Fold what a branch is multiplied by into its last layers."""
    gain = gain_of(block, index)
    if gain is None or any(not isinstance(each, nn.Linear) or owners[each] > 1 for each in layers):
        return
    for layer in layers:
        scale_rows(cast(nn.Linear, layer), gain)
    if hasattr(block, f"ls{index}"):
        setattr(block, f"ls{index}", nn.Identity())
    else:
        setattr(block, f"gamma_{index}", None)


def gain_of(block: Any, index: str) -> Tensor | None:
    """Return what a branch is multiplied by, (C,), as a LayerScale or as a weight, or None."""
    scale = getattr(block, f"ls{index}", None)
    return getattr(scale, "gamma", getattr(block, f"gamma_{index}", None))


# --- costs


def cost(model: Any, name: str, stem: Stem, costs: Sequence[Cost] | None = None) -> ModelCost:
    """Return sites and MACs of a model.

    Args:
        model: with `blocks`, and the parts of a head that it has.
        name: what the user calls it.
        stem: what comes before the blocks.
        costs: of each block; None for blocks of an attention and an MLP.
    """
    n_prefix = model.num_prefix_tokens
    n_tokens = stem.n_patches + n_prefix
    of_head = linear_macs(model.head) + linear_macs(getattr(model, "head_dist", None))
    norm_head = norm_elements(model.fc_norm)
    norm_first = stem.normalised + n_tokens * norm_elements(getattr(model, "norm_pre", None))
    pool = pool_products = 0
    if (attn_pool := getattr(model, "attn_pool", None)) is not None:
        n_latent = attn_pool.latent_len
        pool_products = 2 * n_latent * attn_pool.kv.in_features
        pool = linear_macs(attn_pool.kv) + pool_products
        of_head += n_latent * (linear_macs(attn_pool) - linear_macs(attn_pool.kv))
        of_head += pool * (n_prefix - _not_pooled(model))
        norm_head += n_latent * norm_elements(attn_pool)
    return ModelCost(
        name=name,
        sites=sites_of(model, n_tokens, n_prefix, costs),
        fixed=stem.macs + of_head,
        pool=pool,
        n_read=n_read(model),
        pool_products=pool_products,
        norm_fixed=norm_first + norm_head,
        norm_left=norm_elements(model.norm),
        head=of_head,
        norm_head=norm_head,
    )


def sites_of(
    model: Any, n_tokens: int, n_prefix: int, costs: Sequence[Cost] | None = None
) -> tuple[Site, ...]:
    """Return the sites of a model; costs are of each block, if not an attention and an MLP."""
    if costs is None:
        costs = [cost_of_block(call) for call in calls(model)]
    return tuple(
        Site(
            stage=0,
            call=index,
            block=f"blocks.{index}",
            tokens_first=n_tokens,
            n_prefix=n_prefix,
            multiple=1,
            width=model.embed_dim,
            cost=each,
        )
        for index, each in enumerate(costs)
    )


def cost_of_block(call: Call) -> Cost:
    """Return what a block of an attention and an MLP costs."""
    block, attn = call.block, call.block.attn
    products = linear_macs(attn) - linear_macs(getattr(attn, "rel_pos", None))
    if attn.qkv is None:
        q, kv = linear_macs(attn.q_proj), linear_macs(attn.k_proj) + linear_macs(attn.v_proj)
    else:
        q, kv = linear_macs(attn.qkv) // 3, 2 * linear_macs(attn.qkv) // 3
    return Cost(
        before=products,
        pair=2 * attn.proj.in_features,
        after=linear_macs(block.mlp),
        query=products - kv - (0 if call.alone else q),
        norm_before=norm_elements(block.norm1) + norms_of_attention(attn),
        norm_after=norm_elements(block.norm2) + norm_elements(block.mlp),
    )


def norms_of_attention(attn: Any) -> int:
    """Return the elements per token that an attention normalises."""
    n_heads, n_kv_heads = attn.num_heads, getattr(attn, "num_kv_heads", attn.num_heads)
    of_queries = n_heads * norm_elements(getattr(attn, "q_norm", None))
    of_keys = n_kv_heads * norm_elements(getattr(attn, "k_norm", None))
    return int(of_queries + of_keys) + norm_elements(getattr(attn, "norm", None))


def conv_stem(model: Any) -> Stem:
    """Return what the one convolution of a patch embedding costs."""
    embed = model.patch_embed
    normalised = embed.num_patches * norm_elements(embed.norm)
    return Stem(embed.num_patches, embed.num_patches * embed.proj.weight.numel(), normalised)


# --- what goes in and comes out


def _input_shape(model: Any) -> tuple[int, int, int]:
    height, width = model.patch_embed.img_size
    return model.in_chans, height, width


def _resize(model: Any, img_size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how timm interpolates
        model.set_input_size(img_size=img_size)


def _output(model: Any) -> str:
    return "features" if isinstance(model.head, nn.Identity) else "logits"


def n_read(model: Any) -> int | None:
    """Return how many tokens at the front the head reads, or None."""
    if model.global_pool != "token":
        return None
    return 1 if getattr(model, "head_dist", None) is None else 2


def _not_pooled(model: Any) -> int:
    """Return how many tokens at the front pooling leaves out."""
    reads_prefix = getattr(model, "pool_include_prefix", model.global_pool == "map")  # Eva's map
    return 0 if reads_prefix else int(model.num_prefix_tokens)


def head(model: Any, x: Tensor, size: Tensor | None, n_patches: int) -> Tensor:
    """Pool and classify tokens (B, N, C) that stand for n_patches and the prefix."""
    x = model.norm(x)
    if size is None or model.global_pool == "token":
        return cast(Tensor, model.forward_head(x))
    skip = _not_pooled(model)
    x, size = x[:, skip:], size[:, skip:]
    if model.global_pool == "map":
        pooled = model.attn_pool(x, attn_mask=bias_of_size(size))  # (B, C)
    else:  # the sizes add up to the tokens that there were
        n_pooled = n_patches + model.num_prefix_tokens - skip
        pooled = (x * size).sum(dim=1) / n_pooled  # (B, C)
    return cast(Tensor, model.head(model.fc_norm(pooled)))


# --- blocks


def calls(model: Any, steps: Sequence[Step] = ()) -> Sequence[Call]:
    """Return the calls of the blocks."""
    del steps
    uses = Counter(_queries(block) for block in model.blocks)
    return tuple(Call(block, uses[_queries(block)] == 1) for block in model.blocks)


def _queries(block: Any) -> nn.Module:
    layer: nn.Module = block.attn.q_proj if block.attn.qkv is None else block.attn.qkv
    return layer


def attention(call: Call, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    """Compute x after the attention residual, of the first n_out tokens, and the signals of all."""
    block, x = call.block, tokens.x
    h = taken(block, 1, x)
    # weights that other calls use are used whole: a file would hold their parts once more
    q, k, v = project(block.attn, h, n_out if call.alone else None)
    q = q if n_out is None else q[:, :, :n_out]
    out, signals = attended(block.attn, h, (q, k, v), tokens, getattr(block, "positions", None))
    return x[:, :n_out] + given(block, 1, out), signals


def mlp(call: Call, x: Tensor) -> Tensor:
    """Compute x after the MLP residual."""
    return x + given(call.block, 2, call.block.mlp(taken(call.block, 2, x)))


def taken(block: Any, index: int, x: Tensor) -> Tensor:
    """Return what a branch is given."""
    if type(block).__name__ in _NORM_LAST:
        return x
    return cast(Tensor, getattr(block, f"norm{index}")(x))


def given(block: Any, index: int, out: Tensor) -> Tensor:
    """Return what a branch adds."""
    if type(block).__name__ in _NORM_LAST:
        return cast(Tensor, getattr(block, f"norm{index}")(out))
    if (scale := getattr(block, f"ls{index}", None)) is not None:
        return cast(Tensor, scale(out))
    gain = getattr(block, f"gamma_{index}", None)
    return out if gain is None else cast(Tensor, out * gain)


def attended(
    attn: Any, h: Tensor, projected: tuple[Tensor, Tensor, Tensor], tokens: Tokens,
    positions: Rotary | Relative | None = None,
) -> tuple[Tensor, Signals]:  # fmt: skip
    """Compute an attention, from the projections of h (B, N, C) to its own.

    Args:
        attn: of timm, with heads of one width.
        h: what was projected.
        projected: queries of the first M tokens, (B, H, M, D), keys and values of all, (B, H or
            fewer, N, D).
        tokens: their sizes and places.
        positions: how it reads places.
    """
    q, k, v = projected
    n_out = q.shape[2]
    queries, keys = _part(attn, "q_norm")(q), _part(attn, "k_norm")(k)
    bias = None if tokens.size is None else bias_of_size(tokens.size)
    if isinstance(positions, Rotary):
        queries, keys = positions(queries, keys, tokens.place)
    elif isinstance(positions, Relative):
        relative = positions(tokens.place, n_out)
        bias = relative if bias is None else relative + bias
    keys, values = _for_all_heads(keys, q), _for_all_heads(v, q)
    out = attend(queries, keys, values, bias, attn.scale)
    out = _part(attn, "norm")(out.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(h[:, :n_out]).sigmoid()
    signals = Signals(
        keys=k, queries=q, values=v, normed=h,
        class_attention=partial(class_attention, queries, keys, bias, attn.scale),
    )  # fmt: skip
    return attn.proj(out), signals


def bias_of_size(size: Tensor) -> Tensor:
    """Return what size adds to the scores of a key: (B, N, 1) → (B, 1, 1, N)."""
    return size.log().reshape(-1, 1, 1, size.shape[1])


def _part(attn: Any, name: str) -> Callable[[Tensor], Tensor]:
    part = getattr(attn, name, None)
    return nn.Identity() if part is None else cast(Callable[[Tensor], Tensor], part)


def _for_all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Repeat what groups of queries share (grouped-query attention)."""
    n_shared = q.shape[1] // x.shape[1]
    if n_shared == 1:
        return x
    return x[:, :, None].expand(-1, -1, n_shared, -1, -1).flatten(1, 2)


def project(attn: Any, h: Tensor, n_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values; queries of the first n_out tokens only, unless None."""
    width = attn.proj.in_features
    split = partial(heads, width=width // attn.num_heads)
    if attn.qkv is None:
        return split(attn.q_proj(h[:, :n_out])), split(attn.k_proj(h)), split(attn.v_proj(h))
    if n_out is None:
        q, k, v = torch.split(split(attn.qkv(h)), attn.num_heads, dim=1)
        return q, k, v
    q_layer, kv_layer = divided(attn.qkv, width)
    k, v = torch.split(split(kv_layer(h)), attn.num_heads, dim=1)
    return split(q_layer(h[:, :n_out])), k, v


def divided(
    layer: nn.Linear, first: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the two layers that give the first outputs of a layer, and the others."""
    weight, bias = layer.weight, layer.bias
    halves = (None, None) if bias is None else (bias[:first], bias[first:])
    return (
        partial(functional.linear, weight=weight[:first], bias=halves[0]),
        partial(functional.linear, weight=weight[first:], bias=halves[1]),
    )


def heads(x: Tensor, width: int) -> Tensor:
    """(B, N, H·D) → (B, H, N, D): one transposition, after which a split is a view."""
    n_batch, n, channels = x.shape
    return x.reshape(n_batch, n, channels // width, width).transpose(1, 2)
