"""Plain vision transformers: timm's modules `vision_transformer` and `deit`.

Sources: Dosovitskiy et al., ICLR 2021; Touvron et al., ICML 2021 (DeiT) and ECCV 2022 (DeiT III);
implementation: timm's vision_transformer.py and deit.py, whose submodules are called as they are.

Modifications to timm's forward, all of them exact while nothing has merged:
- the block is split between attention and MLP, where tokens merge;
- keys are handed out before qk-norm, where ToMe takes them;
- attention adds log(size) to the scores of each key (proportional attention);
- average pooling is weighted by size, attention pooling adds log(size) to its scores.
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
    return ModelCost(name, sites, fixed, pool)


def _input_shape(model: Any) -> tuple[int, int, int]:
    height, width = model.patch_embed.img_size
    return model.in_chans, height, width


def _output(model: Any) -> str:
    return "features" if isinstance(model.head, nn.Identity) else "logits"


def _embed(model: Any, image: Tensor) -> Tensor:
    x = model._pos_embed(model.patch_embed(image))  # (B, N, C)
    return cast(Tensor, model.norm_pre(x))


def _blocks(model: Any) -> Sequence[nn.Module]:
    return tuple(model.blocks)


def _attention(block: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Signals]:
    attn = block.attn
    n_batch, n, _ = x.shape
    h = block.norm1(x)
    q, k, v = (
        part.reshape(n_batch, n, attn.num_heads, attn.head_dim)
        for part in attn.qkv(h).split(attn.attn_dim, dim=-1)
    )  # (B, N, H, D)
    bias = None if size is None else size.log().reshape(n_batch, 1, 1, n)
    out = _attend(attn.q_norm(q), attn.k_norm(k), v, bias, attn.scale)  # (B, N, H·D)
    out = attn.norm(out)
    if attn.gate is not None:
        out = out * attn.gate(h).sigmoid()
    out = attn.proj(out)
    return x + block.ls1(out), Signals(keys=k)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, (B, N, H, D) each; bias (B, 1, 1, N) is added to the scores of each key.

    Fused in PyTorch; written out for export, where the fused form with a bias fails (torch 2.13).
    """
    if torch.onnx.is_in_onnx_export():
        scores = (q.transpose(1, 2) * scale) @ k.permute(0, 2, 3, 1)  # (B, H, N, N)
        scores = scores if bias is None else scores + bias
        out = scores.softmax(dim=-1) @ v.transpose(1, 2)
    else:
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias
        )  # (B, H, N, D)
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
    cost=_cost,
    input_shape=_input_shape,
    output=_output,
    embed=_embed,
    blocks=_blocks,
    attention=_attention,
    mlp=_mlp,
    head=_head,
)
