"""ViTs with relative positions: timm's module `vision_transformer_relpos`.

The bias of a block is its own or that of all blocks; its table is learned, or a small network's of
the logarithms of distances, which does not depend on the image and is computed once.

Sources: Liu et al., Swin Transformer, ICCV 2021 (the table), and V2, CVPR 2022 (the network);
implementation: timm's vision_transformer_relpos.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tomexport.exporter.families import beit, transformer
from tomexport.exporter.families.positions import Relative
from tomexport.exporter.zoo import timm


def _accepts(model: nn.Module) -> bool:
    timm()
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return type(model) is VisionTransformerRelPos


def _refusal(model: Any) -> str | None:
    from timm.layers import PatchEmbed, RelPosBias, RelPosMlp
    from timm.models.vision_transformer_relpos import (
        RelPosAttention,
        RelPosBlock,
        ResPostRelPosBlock,
    )

    blocks = transformer.refusal_of_blocks(
        model, (RelPosBlock, ResPostRelPosBlock), (RelPosAttention,)
    )
    if blocks:
        return blocks
    for positions in (model.shared_rel_pos, *(block.attn.rel_pos for block in model.blocks)):
        if positions is not None and type(positions) not in (RelPosBias, RelPosMlp):
            return (
                f"its relative positions are a {type(positions).__name__}; only the tables of "
                "RelPosBias and RelPosMlp can follow merged tokens."
            )
    return transformer.refusal_of_patches(model, (PatchEmbed,)) or transformer.refusal_of_pooling(
        model
    )


def _prepare(model: Any) -> None:
    transformer.prepare(model)
    shared = _relative(model.shared_rel_pos)
    for block in model.blocks:
        own = _relative(block.attn.rel_pos)
        block.positions = shared if own is None else own


def _relative(positions: Any) -> Relative | None:
    if positions is None:
        return None
    if not hasattr(positions, "mlp"):
        index = positions.relative_position_index.reshape(positions.bias_shape[:2])
        return Relative(positions.relative_position_bias_table, index)
    with torch.no_grad():
        table = positions.bias_act(positions.mlp(positions.rel_coords_log).flatten(0, 1))
    table = table * (1 if positions.bias_gain is None else positions.bias_gain)
    index = positions.relative_position_index.reshape(positions.bias_shape[:2])
    if n_prefix := positions.prefix_tokens:  # without bias
        table = torch.cat([table, torch.zeros_like(table[:1])])
        index = functional.pad(index, [n_prefix, 0, n_prefix, 0], value=len(table) - 1)
    return Relative(table, index)


RELPOS = transformer.family(
    "relpos",
    modules=("vision_transformer_relpos",),
    accepts=_accepts,
    refusal=_refusal,
    prepare=_prepare,
    embed=beit.embed,
    places=True,
)
