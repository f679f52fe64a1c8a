"""BEiT: timm's module `beit`, with a bias of relative positions in each block.

Sources: Bao et al., BEiT, ICLR 2022; Peng et al., BEiT v2, 2022; implementation: timm's beit.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tomexport.exporter.families import transformer
from tomexport.exporter.families.positions import Relative
from tomexport.exporter.zoo import timm


def _accepts(model: nn.Module) -> bool:
    timm()
    from timm.models.beit import Beit

    return type(model) is Beit


def _refusal(model: Any) -> str | None:
    from timm.layers import PatchEmbed
    from timm.models.beit import Attention, Block

    return (
        transformer.refusal_of_blocks(model, (Block,), (Attention,))
        or transformer.refusal_of_patches(model, (PatchEmbed,))
        or transformer.refusal_of_pooling(model)
    )


def _prepare(model: Any) -> None:
    transformer.prepare(model)
    for block in model.blocks:
        owners = [o for o in (block.attn, model.rel_pos_bias) if _table(o) is not None]
        if owners:  # of one grid, so that their tables have one index
            table = torch.stack([owner.relative_position_bias_table for owner in owners]).sum(0)
            block.positions = Relative(table, owners[0].relative_position_index)


def _table(owner: Any) -> Tensor | None:
    return getattr(owner, "relative_position_bias_table", None)


def embed(model: Any, image: Tensor) -> Tensor:
    """Compute the tokens (B, N, C) that the blocks are given."""
    x: Tensor = model.patch_embed(image)
    if model.cls_token is not None:
        x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    position = getattr(model, "pos_embed", None)
    return x if position is None else x + position


BEIT = transformer.family(
    "beit",
    modules=("beit",),
    accepts=_accepts,
    refusal=_refusal,
    prepare=_prepare,
    embed=embed,
    places=True,
)
