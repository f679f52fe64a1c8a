"""NaFlex ViTs at one image size: timm's module `naflexvit`.

These models take images of any size and shape; here the size is that of their configuration, or the
one that is asked for, and the positions are resampled for it once, as timm does at every call.

Sources: Dehghani et al., NaViT, NeurIPS 2023; Beyer et al., FlexiViT, CVPR 2023; implementation:
timm's naflexvit.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tomexport.exporter.families import transformer
from tomexport.exporter.families.family import norm_elements
from tomexport.exporter.families.transformer import Stem
from tomexport.exporter.zoo import timm
from tomexport.plan import ModelCost


def _accepts(model: nn.Module) -> bool:
    timm()
    from timm.models.naflexvit import NaFlexVit

    return type(model) is NaFlexVit


def _refusal(model: Any) -> str | None:
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    blocks = transformer.refusal_of_blocks(model, (Block,), (Attention,))
    if blocks or model.rope is not None:
        return blocks or "its rotary positions are made for images of any size."
    traits = getattr(model, "_traits", {})
    if not (getattr(model, "pretrained_cfg", None) or traits.get("img_size")):
        return (
            "it takes images of any size, and nothing says which: build it by its timm name, which "
            "has one."
        )
    return transformer.refusal_of_pooling(model)


def _input_shape(model: Any) -> tuple[int, int, int]:
    from timm.models import get_model_input_config

    channels, height, width = get_model_input_config(model)["input_size"]
    return channels, height, width


def _resize(model: Any, img_size: tuple[int, int]) -> None:
    model._traits = dict(model._traits, img_size=img_size)  # as timm's own set_input_size do


def _grid(model: Any) -> tuple[int, int]:
    _, height, width = _input_shape(model)
    rows, columns = model.embeds.patch_size
    return height // rows, width // columns


def _prepare(model: Any) -> None:
    transformer.prepare(model)
    embeds, (rows, columns) = model.embeds, _grid(model)
    if embeds.pos_embed_type == "none":
        return
    add = getattr(embeds, f"_apply_{embeds.pos_embed_type}_pos_embed")
    table = torch.zeros(1, rows * columns, embeds.embed_dim)
    with torch.no_grad():
        add(table, grid_size=[rows, columns])
    embeds.pos_embed = nn.Parameter(table.reshape(1, rows, columns, -1))
    embeds.pos_embed_type = "learned"


def _n_patches(model: Any) -> int:
    rows, columns = _grid(model)
    return rows * columns


def _cost(model: Any, name: str) -> ModelCost:
    n_patches, embeds = _n_patches(model), model.embeds
    normalised = n_patches * (norm_elements(embeds.norm_input) + norm_elements(embeds.norm))
    stem = Stem(n_patches, n_patches * embeds.proj.weight.numel(), normalised)
    return transformer.cost(model, name, stem)


def _embed(model: Any, image: Tensor) -> Tensor:
    x, _ = model.embeds(image)
    return cast(Tensor, model.norm_pre(x))


NAFLEX = transformer.family(
    "naflex",
    modules=("naflexvit",),
    accepts=_accepts,
    refusal=_refusal,
    prepare=_prepare,
    cost=_cost,
    input_shape=_input_shape,
    grain=lambda model: model.embeds.patch_size,
    resize=_resize,
    embed=_embed,
    head=lambda model, x, size: transformer.head(model, x, size, _n_patches(model)),
)
