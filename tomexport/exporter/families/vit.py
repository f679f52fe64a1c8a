"""Plain vision transformers: timm's modules `vision_transformer` and `deit`.

Sources: Dosovitskiy et al., ICLR 2021; Touvron et al., ICML 2021 (DeiT) and ECCV 2022 (DeiT III);
implementation: timm's vision_transformer.py and deit.py, whose submodules are called as they are.

Modifications to timm's forward, all of them exact while nothing has merged:
- the block is split between attention and MLP, where tokens merge;
- keys are handed out before qk-norm, where ToMe takes them;
- attention adds log(size) to the scores of each key (proportional attention);
- average pooling is weighted by size, attention pooling adds log(size) to its scores;
- where only the class token is read, the last block computes no other.

A block may be called more than once (recursive models): then its weights are stored once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from tomexport.exporter.zoo import timm
from tomexport.plan import Cost, ModelCost, Site, Step


def _accepts(model: nn.Module) -> bool:
    timm()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    return type(model) in (VisionTransformer, VisionTransformerDistilled)


def _refusal(model: Any) -> str | None:
    from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
    from timm.models.vision_transformer import Block

    if not len(model.blocks):
        return "it has no blocks."
    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            return (
                f"block {index} is a {type(block).__name__}, whose order of attention, norms and "
                "MLP is another than Block's; only timm's Block is known here."
            )
        if type(block.attn) is not Attention:
            return (
                f"the attention of block {index} is a {type(block.attn).__name__}; only timm's "
                "Attention has the one set of keys that merging compares."
            )
        for name, module in block.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return (
                    f"block {index} has a forward hook on {name or 'itself'}, which the reduced "
                    "module would drop; remove the hook first."
                )
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patch embedding is a {type(model.patch_embed).__name__}, not a PatchEmbed."
    if model.patch_embed.img_size is None:
        return "it has no fixed image size, so its token counts are not known before it runs."
    if model.global_pool not in ("token", "avg", "map"):
        return (
            f"its pooling is {model.global_pool!r}; over merged tokens only 'token', 'avg' and "
            "'map' are known to give what they give over all tokens."
        )
    if model.global_pool == "map" and (
        type(model.attn_pool) is not AttentionPoolLatent or model.attn_pool.pos_embed is not None
    ):
        return "its attention pool is not the position-free AttentionPoolLatent."
    if not isinstance(model.patch_drop, nn.Identity):
        return "it drops patches at random (patch_drop_rate); build it without."
    return None


def _prepare(model: Any) -> None:
    if model.attn_pool is not None:
        model.attn_pool.fused_attn = False  # the fused form does not export with a size bias


class _Call(NamedTuple):
    """A call of a block.

    Attributes:
        block: what is called.
        alone: whether it is the only call that computes with these queries, keys and values.
    """

    block: Any
    alone: bool


def _fold(model: Any) -> None:
    blocks = list(dict.fromkeys(model.blocks))
    owners = Counter(layer for block in blocks for layer in block.modules())
    for block in blocks:
        attn = block.attn
        if isinstance(attn.q_norm, nn.Identity):
            rows = torch.ones(attn.qkv.out_features)
            rows[: attn.attn_dim] = attn.scale
            scale_rows(attn.qkv, rows)
            attn.scale = 1.0
        for layer_scale, owner, last in (("ls1", attn, "proj"), ("ls2", block.mlp, "fc2")):
            gamma = getattr(getattr(block, layer_scale), "gamma", None)
            layer = getattr(owner, last, None)
            if gamma is not None and isinstance(layer, nn.Linear) and owners[layer] == 1:
                scale_rows(layer, gamma)
                setattr(block, layer_scale, nn.Identity())


def _cost(model: Any, name: str) -> ModelCost:
    n_patches = model.patch_embed.num_patches
    n_tokens = n_patches + model.num_prefix_tokens
    sites = sites_of(model, n_tokens, model.num_prefix_tokens)
    stem = n_patches * model.patch_embed.proj.weight.numel()
    head = linear_macs(model.head) + linear_macs(getattr(model, "head_dist", None))
    norm_head = norm_elements(model.fc_norm)
    pool = pool_products = 0
    if (attn_pool := model.attn_pool) is not None:
        n_latent = attn_pool.latent_len
        pool_products = 2 * n_latent * attn_pool.kv.in_features
        pool = linear_macs(attn_pool.kv) + pool_products
        head += n_latent * (linear_macs(attn_pool) - linear_macs(attn_pool.kv))
        norm_head += n_latent * norm_elements(attn_pool)
    return ModelCost(
        name=name,
        sites=sites,
        fixed=stem + head,
        pool=pool,
        n_read=_n_read(model),
        pool_products=pool_products,
        norm_fixed=n_tokens * norm_elements(model.norm_pre) + norm_head,
        norm_left=norm_elements(model.norm),
        head=head,
        norm_head=norm_head,
    )


def sites_of(model: Any, n_tokens: int, n_prefix: int) -> tuple[Site, ...]:
    """Return the sites of a model whose blocks have the parts of timm's Block."""
    return tuple(
        Site(
            stage=0,
            call=index,
            block=f"blocks.{index}",
            tokens_first=n_tokens,
            n_prefix=n_prefix,
            multiple=1,
            width=model.embed_dim,
            cost=Cost(
                before=linear_macs(block.attn),
                pair=2 * block.attn.attn_dim,
                after=linear_macs(block.mlp),
                query=_query_macs(block.attn, alone),
                norm_before=norm_elements(block.norm1) + _norms_of_attention(block.attn),
                norm_after=norm_elements(block.norm2) + norm_elements(block.mlp),
            ),
        )
        for index, (block, alone) in enumerate(_calls(model))
    )


def _query_macs(attn: Any, alone: bool) -> int:
    qkv = linear_macs(attn.qkv)
    return linear_macs(attn) - (2 * qkv // 3 if alone else qkv)


def _norms_of_attention(attn: Any) -> int:
    per_head = norm_elements(attn.q_norm) + norm_elements(attn.k_norm)
    return int(attn.num_heads) * per_head + norm_elements(attn.norm)


def _input_shape(model: Any) -> tuple[int, int, int]:
    height, width = model.patch_embed.img_size
    return model.in_chans, height, width


def _output(model: Any) -> str:
    return "features" if isinstance(model.head, nn.Identity) else "logits"


def _grain(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.patch_size
    return height, width


def _resize(model: Any, img_size: tuple[int, int]) -> None:
    model.set_input_size(img_size=img_size)


def _n_read(model: Any) -> int | None:
    if model.global_pool != "token":
        return None
    return 1 if getattr(model, "head_dist", None) is None else 2


def _embed(model: Any, image: Tensor) -> Tensor:
    x = model._pos_embed(model.patch_embed(image))  # (B, N, C)
    return cast(Tensor, model.norm_pre(x))


def _calls(model: Any, steps: Sequence[Step] = ()) -> Sequence[_Call]:
    del steps
    uses = Counter(block.attn.qkv for block in model.blocks)
    return tuple(_Call(block, uses[block.attn.qkv] == 1) for block in model.blocks)


def _attention(call: _Call, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    block, attn, x, size = call.block, call.block.attn, tokens.x, tokens.size
    h = block.norm1(x)
    # weights that other calls use are used whole: a file would hold their parts once more
    q, k, v = _project(attn, h, n_out if call.alone else None)  # (B, H, N, D)
    if n_out is not None and not call.alone:
        q = q[:, :, :n_out]
    bias = None if size is None else size.log().reshape(-1, 1, 1, x.shape[1])
    queries, keys = attn.q_norm(q), attn.k_norm(k)
    out = attend(queries, keys, v, bias, attn.scale)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    signals = Signals(
        keys=k, queries=q, values=v, normed=h,
        class_attention=partial(class_attention, queries, keys, bias, attn.scale),
    )  # fmt: skip
    x, h = x[:, :n_out], h[:, :n_out]
    if attn.gate is not None:
        out = out * attn.gate(h).sigmoid()
    return x + block.ls1(attn.proj(out)), signals


def _project(attn: Any, h: Tensor, n_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values; queries of the first n_out tokens only, unless None."""
    if n_out is None:
        q, k, v = torch.split(_heads(attn.qkv(h), attn), attn.num_heads, dim=1)
        return q, k, v
    weight, bias, dim = attn.qkv.weight, attn.qkv.bias, attn.attn_dim
    q_bias, kv_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
    q = _heads(functional.linear(h[:, :n_out], weight[:dim], q_bias), attn)
    kv = _heads(functional.linear(h, weight[dim:], kv_bias), attn)
    k, v = torch.split(kv, attn.num_heads, dim=1)
    return q, k, v


def _heads(x: Tensor, attn: Any) -> Tensor:
    """(B, N, heads·D) → (B, heads, N, D): one transposition, after which a split is a view."""
    n_batch, n, width = x.shape
    return x.reshape(n_batch, n, width // attn.head_dim, attn.head_dim).transpose(1, 2)


def _mlp(call: _Call, x: Tensor) -> Tensor:
    block = call.block
    return cast(Tensor, x + block.ls2(block.mlp(block.norm2(x))))


def _head(model: Any, x: Tensor, size: Tensor | None) -> Tensor:
    x = model.norm(x)
    if size is None or model.global_pool == "token":
        return cast(Tensor, model.forward_head(x))
    skip = 0 if model.pool_include_prefix else model.num_prefix_tokens
    x, size = x[:, skip:], size[:, skip:]
    if model.global_pool == "map":
        bias = size.log().reshape(x.shape[0], 1, 1, x.shape[1])
        pooled = model.attn_pool(x, attn_mask=bias)  # (B, C)
    else:  # the sizes add up to the tokens that there were
        n_pooled = model.patch_embed.num_patches + model.num_prefix_tokens - skip
        pooled = (x * size).sum(dim=1) / n_pooled  # (B, C)
    return cast(Tensor, model.head(model.fc_norm(pooled)))


VIT = Family(
    name="vit",
    modules=("vision_transformer", "deit"),
    signals=("keys", "queries", "values", "normed", "class_attention"),
    accepts=_accepts,
    refusal=_refusal,
    prepare=_prepare,
    fold=_fold,
    cost=_cost,
    input_shape=_input_shape,
    grain=_grain,
    resize=_resize,
    output=_output,
    n_read=_n_read,
    embed=_embed,
    calls=_calls,
    attention=_attention,
    mlp=_mlp,
    head=_head,
)
