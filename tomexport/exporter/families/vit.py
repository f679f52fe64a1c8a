"""Plain vision transformers: timm's modules `vision_transformer` and `deit`.

Sources: Dosovitskiy et al., ICLR 2021; Touvron et al., ICML 2021 (DeiT) and ECCV 2022 (DeiT III);
implementation: timm's vision_transformer.py and deit.py, whose submodules are called as they are.

Modifications to timm's forward, all of them exact while nothing has merged:
- the block is split between attention and MLP, where tokens merge;
- keys are handed out before qk-norm, where ToMe takes them;
- attention adds log(size) to the scores of each key (proportional attention);
- average pooling is weighted by size, attention pooling adds log(size) to its scores;
- where only the class token is read, the last block computes no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tomexport.exporter.families.family import Family, Signals
from tomexport.exporter.zoo import timm
from tomexport.plan import Cost, ModelCost, Site


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


def _fold(model: Any) -> None:
    for block in model.blocks:
        attn = block.attn
        if isinstance(attn.q_norm, nn.Identity):
            rows = torch.ones(attn.qkv.out_features)
            rows[: attn.attn_dim] = attn.scale
            _scale_rows(attn.qkv, rows)
            attn.scale = 1.0
        for layer_scale, owner, last in (("ls1", attn, "proj"), ("ls2", block.mlp, "fc2")):
            gamma = getattr(getattr(block, layer_scale), "gamma", None)
            if gamma is not None and isinstance(getattr(owner, last, None), nn.Linear):
                _scale_rows(getattr(owner, last), gamma)
                setattr(block, layer_scale, nn.Identity())


def _scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    """Replace the weights, which may be shared, by scaled ones."""
    linear.weight = nn.Parameter(linear.weight.detach() * factors[:, None])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach() * factors)


def _linear_macs(module: nn.Module | None) -> int:
    """MACs per token of all linear layers of a module."""
    layers = module.modules() if module is not None else ()
    return sum(m.in_features * m.out_features for m in layers if isinstance(m, nn.Linear))


def _cost(model: Any, name: str) -> ModelCost:
    n_patches = model.patch_embed.num_patches
    n_tokens = n_patches + model.num_prefix_tokens
    sites = tuple(
        Site(
            stage=0,
            call=index,
            block=f"blocks.{index}",
            tokens_first=n_tokens,
            n_prefix=model.num_prefix_tokens,
            multiple=1,
            cost=Cost(
                before=_linear_macs(block.attn),
                pair=2 * block.attn.attn_dim,
                after=_linear_macs(block.mlp),
                query=_linear_macs(block.attn) - 2 * _linear_macs(block.attn.qkv) // 3,
            ),
        )
        for index, block in enumerate(model.blocks)
    )
    fixed = n_patches * model.patch_embed.proj.weight.numel()
    fixed += _linear_macs(model.head) + _linear_macs(getattr(model, "head_dist", None))
    pool = 0
    if (attn_pool := model.attn_pool) is not None:
        n_latent = attn_pool.latent_len
        pool = _linear_macs(attn_pool.kv) + 2 * n_latent * attn_pool.kv.in_features
        fixed += n_latent * (_linear_macs(attn_pool) - _linear_macs(attn_pool.kv))
    return ModelCost(name, sites, fixed, pool, _n_read(model))


def _input_shape(model: Any) -> tuple[int, int, int]:
    height, width = model.patch_embed.img_size
    return model.in_chans, height, width


def _output(model: Any) -> str:
    return "features" if isinstance(model.head, nn.Identity) else "logits"


def _n_read(model: Any) -> int | None:
    if model.global_pool != "token":
        return None
    return 1 if getattr(model, "head_dist", None) is None else 2


def _embed(model: Any, image: Tensor) -> Tensor:
    x = model._pos_embed(model.patch_embed(image))  # (B, N, C)
    return cast(Tensor, model.norm_pre(x))


def _blocks(model: Any) -> Sequence[nn.Module]:
    return tuple(model.blocks)


def _attention(
    block: Any, x: Tensor, size: Tensor | None, n_out: int | None
) -> tuple[Tensor, Signals]:
    attn = block.attn
    h = block.norm1(x)
    q, k, v = _project(attn, h, n_out)  # (B, H, N, D), but q (B, H, n_out, D)
    bias = None if size is None else size.log().reshape(-1, 1, 1, x.shape[1])
    out = attn.norm(_attend(attn.q_norm(q), attn.k_norm(k), v, bias, attn.scale))
    x, h = x[:, :n_out], h[:, :n_out]
    if attn.gate is not None:
        out = out * attn.gate(h).sigmoid()
    return x + block.ls1(attn.proj(out)), Signals(keys=k)


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


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, (B, H, N, D) each → (B, N, H·D); bias (B, 1, 1, N) is of each key.

    Fused in PyTorch; written out for export, where the fused form with a bias fails (torch 2.13).
    """
    if torch.onnx.is_in_onnx_export():
        scores = (q if scale == 1 else q * scale) @ k.mT  # (B, H, N, N)
        scores = scores if bias is None else scores + bias
        out = scores.softmax(dim=-1) @ v
    else:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _mlp(block: Any, x: Tensor) -> Tensor:
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
    signals=("keys",),
    accepts=_accepts,
    refusal=_refusal,
    prepare=_prepare,
    fold=_fold,
    cost=_cost,
    input_shape=_input_shape,
    output=_output,
    n_read=_n_read,
    embed=_embed,
    blocks=_blocks,
    attention=_attention,
    mlp=_mlp,
    head=_head,
)
