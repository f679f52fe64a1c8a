"""Clips and spectrograms: `exporter/models/videomae.py` and `ast.py`.

Their blocks are timm's, so attention and MLP are those of plain vision transformers. What differs
is how a signal becomes tokens, and what the head reads of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from tomexport.exporter.families.family import linear_macs, norm_elements
from tomexport.exporter.families.transformer import sites_of
from tomexport.exporter.families.vit import VIT
from tomexport.exporter.models.ast import AST
from tomexport.exporter.models.videomae import VideoMAE
from tomexport.plan import ModelCost


def _accepts(model: nn.Module) -> bool:
    return type(model) in (VideoMAE, AST)


def _none(model: Any) -> None:
    del model


def _cost(model: Any, name: str) -> ModelCost:
    n_prefix, head = model.num_prefix_tokens, linear_macs(model.head)
    norm_head = norm_elements(model.fc_norm)
    return ModelCost(
        name=name,
        sites=sites_of(model, model.n_patches + n_prefix, n_prefix),
        fixed=model.n_patches * model.patch_embed.proj.weight.numel() + head,
        n_read=model.n_read,
        norm_fixed=norm_head,
        norm_left=norm_elements(model.norm),
        head=head,
        norm_head=norm_head,
    )


def _input_shape(model: Any) -> tuple[int, int, int]:
    shape: tuple[int, int, int] = model.input_shape
    return shape


def _grain(model: Any) -> tuple[int, int]:
    height, width = model.grain
    return height, width


def _resize(model: Any, img_size: tuple[int, int]) -> None:
    model.set_input_size(img_size)


def _n_read(model: Any) -> int | None:
    n: int | None = model.n_read
    return n


def _embed(model: Any, image: Tensor) -> Tensor:
    tokens: Tensor = model.embed(image)
    return tokens


def _head(model: Any, x: Tensor, size: Tensor | None) -> Tensor:
    output: Tensor = model.classify(model.norm(x), size)
    return output


SIGNAL = dataclasses.replace(
    VIT,
    name="signal",
    modules=("videomae", "ast"),
    accepts=_accepts,
    refusal=_none,
    prepare=_none,
    cost=_cost,
    input_shape=_input_shape,
    grain=_grain,
    resize=_resize,
    n_read=_n_read,
    embed=_embed,
    head=_head,
)
