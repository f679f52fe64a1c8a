"""EVA and its relatives: timm's module `eva`, with EVA-02, RoPE ViTs, PE and DINOv3.

Sources: Fang et al., EVA, CVPR 2023, and EVA-02, 2023; Heo et al., ECCV 2024 (RoPE ViT, a table of
rotations for each block and head); Bolya et al., Perception Encoder, 2025; Siméoni et al., DINOv3,
2025; implementation: timm's eva.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tomexport.exporter.families import transformer
from tomexport.exporter.families.positions import Rotary
from tomexport.exporter.zoo import timm


def _accepts(model: nn.Module) -> bool:
    timm()
    from timm.models.eva import Eva

    return type(model) is Eva


def _refusal(model: Any) -> str | None:
    from timm.layers import AttentionRope, PatchEmbed
    from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm

    return (
        transformer.refusal_of_blocks(
            model, (EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope)
        )
        or transformer.refusal_of_patches(model, (PatchEmbed,))
        or transformer.refusal_of_pooling(model)
    )


def _prepare(model: Any) -> None:
    transformer.prepare(model)
    if model.rope is None:
        return
    with torch.no_grad():
        embed = model.rope.eval().get_embed(shape=list(model.patch_embed.grid_size))
    # (N, 2D) for all blocks, or (blocks, H, N, 2D)
    shared = None if model.rope_mixed else _rotary(model, embed)
    for index, block in enumerate(model.blocks):
        block.positions = shared or _rotary(model, embed[index])


def _rotary(model: Any, embed: Tensor) -> Rotary:
    return Rotary(embed, model.num_prefix_tokens, model.blocks[0].attn.rotate_half)


def _embed(model: Any, image: Tensor) -> Tensor:
    x, _ = model._pos_embed(model.patch_embed(image))
    return cast(Tensor, model.norm_pre(x))


EVA = transformer.family(
    "eva",
    modules=("eva",),
    accepts=_accepts,
    refusal=_refusal,
    prepare=_prepare,
    embed=_embed,
    places=True,
)
