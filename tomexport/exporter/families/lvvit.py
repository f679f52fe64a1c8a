"""LV-ViT: `exporter/models/lvvit.py`, whose blocks are those of a plain vision transformer.

The second classifier reads the patch tokens that are left, all of them alike whatever their sizes:
the highest of its outputs is no sum.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from tomexport.exporter.families.family import fuse_norms, linear_macs, norm_elements
from tomexport.exporter.families.transformer import sites_of
from tomexport.exporter.families.vit import VIT
from tomexport.exporter.models.lvvit import PATCH, LVViT
from tomexport.plan import ModelCost

_N_NORMED = 3  # convolutions of the stem that a norm follows


def _accepts(model: nn.Module) -> bool:
    return type(model) is LVViT


def _none(model: Any) -> None:
    del model


def _fold(model: Any) -> None:
    fuse_norms(model.patch_embed, _N_NORMED)
    VIT.fold(model)


def _cost(model: Any, name: str) -> ModelCost:
    rows, columns = model.grid()
    n_patches, stem = rows * columns, model.patch_embed
    n_places = n_patches * (PATCH // 2) ** 2  # before patches are cut
    convolutions, normalised = n_patches * stem.proj.weight.numel(), 0
    for index in range(1, _N_NORMED + 1):
        weight = getattr(stem, f"conv{index}").weight
        convolutions += n_places * weight.numel()
        normalised += n_places * weight.shape[0]
    return ModelCost(
        name=name,
        sites=sites_of(model, 1 + n_patches, 1),
        fixed=convolutions + linear_macs(model.head),
        pool=linear_macs(model.aux_head),
        n_read=_n_read(model),
        norm_fixed=normalised,
        norm_left=norm_elements(model.norm),
        head=linear_macs(model.head),
    )


def _input_shape(model: Any) -> tuple[int, int, int]:
    return (model.in_chans, *model.img_size)


def _grain(model: Any) -> tuple[int, int]:
    del model
    return PATCH, PATCH


def _resize(model: Any, img_size: tuple[int, int]) -> None:
    model.set_input_size(img_size)


def _n_read(model: Any) -> int | None:
    return 1 if model.aux_head is None else None


def _embed(model: Any, image: Tensor) -> Tensor:
    tokens: Tensor = model.embed(image)
    return tokens


def _head(model: Any, x: Tensor, size: Tensor | None) -> Tensor:
    del size
    output: Tensor = model.classify(model.norm(x))
    return output


LVVIT = dataclasses.replace(
    VIT,
    name="lvvit",
    modules=("lvvit",),
    accepts=_accepts,
    refusal=_none,
    prepare=_none,
    fold=_fold,
    cost=_cost,
    input_shape=_input_shape,
    grain=_grain,
    resize=_resize,
    n_read=_n_read,
    embed=_embed,
    head=_head,
)
