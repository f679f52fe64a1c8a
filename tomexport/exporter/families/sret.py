"""Sliced recursive transformers: `exporter/models/sret.py`.

Source: the slides on SReT with token merging for the rule by which tokens merge: at every call,
between the attention residual and the MLP, in each stage anew; what is left of a stage is a
multiple of the slices of its first visits.

Keys come in the order of the tokens, before any reordering. Average pooling is weighted by size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tomexport.exporter.families.family import (
    Family,
    Signals,
    Tokens,
    fuse_norms,
    linear_macs,
    norm_elements,
    scale_rows,
)
from tomexport.exporter.models.sret import GRAIN, Block, Call, Extra, SReT
from tomexport.plan import Cost, ModelCost, Site, Step


def _accepts(model: nn.Module) -> bool:
    return type(model) is SReT


def _refusal(model: Any) -> str | None:
    del model
    return None


def _prepare(model: Any) -> None:
    del model


def _fold(model: Any) -> None:
    fuse_norms(model.patch_embed, 3)
    for module in model.modules():  # a shared block comes once
        if isinstance(module, Block):
            rows = torch.ones(module.attn.qkv.out_features)
            rows[: len(rows) // 3] = module.attn.scale
            scale_rows(module.attn.qkv, rows)
            module.attn.scale = 1.0
            _fold_factor(module, "coefficient2", module.attn.proj)
            _fold_factor(module, "coefficient4", module.mlp.fc2)
        elif isinstance(module, Extra):
            _fold_factor(module, "coefficient2", module.mlp.fc2)


def _fold_factor(block: nn.Module, name: str, last: nn.Linear) -> None:
    scale_rows(last, getattr(block, name).bias.detach())
    setattr(block, name, nn.Identity())


def _cost(model: Any, name: str) -> ModelCost:
    sites = []
    for stage, transformer in enumerate(model.transformers):
        for call in range(len(transformer.blocks) // 2):
            block, extra = transformer.blocks[2 * call : 2 * call + 2]
            rows, columns = model.grid(stage)
            sites.append(
                Site(
                    stage=stage,
                    call=call,
                    block=f"transformers.{stage}.blocks.{2 * call}",
                    tokens_first=rows * columns,
                    n_prefix=0,
                    multiple=model.slices[stage][0],
                    width=block.attn.proj.in_features,
                    cost=Cost(
                        before=linear_macs(block.attn),
                        pair=2 * block.attn.proj.in_features,
                        after=linear_macs(block.mlp) + linear_macs(extra),
                        slices=model.slices[stage][call % 2],
                        norm_before=norm_elements(block.norm1),
                        norm_after=norm_elements(block.norm2) + norm_elements(extra),
                    ),
                )
            )
    convolutions, normalised = _stem(model)
    for stage, pool in enumerate(model.pools, start=1):
        rows, columns = model.grid(stage)
        convolutions += rows * columns * pool.conv.weight.numel()
    return ModelCost(
        name=name,
        sites=tuple(sites),
        fixed=convolutions + linear_macs(model.head),
        norm_fixed=normalised + norm_elements(model.norm),
        head=linear_macs(model.head),
        norm_head=norm_elements(model.norm),
    )


def _stem(model: Any) -> tuple[int, int]:
    """Return the products of the stem, and the elements that it normalises."""
    products = normalised = 0
    for index, stride in ((1, 2), (2, 4), (3, 8)):
        conv = getattr(model.patch_embed, f"conv{index}")
        n_places = (model.img_size[0] // stride) * (model.img_size[1] // stride)
        products += n_places * conv.weight.numel()
        normalised += n_places * conv.out_channels
    return products, normalised


def _input_shape(model: Any) -> tuple[int, int, int]:
    return (model.in_chans, *model.img_size)


def _grain(model: Any) -> tuple[int, int]:
    del model
    return GRAIN, GRAIN


def _resize(model: Any, img_size: tuple[int, int]) -> None:
    model.set_input_size(img_size)


def _output(model: Any) -> str:
    return "features" if isinstance(model.head, nn.Identity) else "logits"


def _n_read(model: Any) -> None:
    del model


def _embed(model: Any, image: Tensor) -> Tensor:
    tokens: Tensor = model.embed(image)
    return tokens


def _downsample(model: Any, stage: int, x: Tensor) -> Tensor:
    tokens: Tensor = model.downsample(stage, x)
    return tokens


def _calls(model: Any, steps: Sequence[Step]) -> Sequence[Call]:
    calls: Sequence[Call] = model.calls([step.attended for step in steps])
    return calls


def _attention(call: Call, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    del n_out  # the head reads all
    x, keys = call.attention(tokens.x, tokens.size)
    return x, Signals(keys=keys)


def _mlp(call: Call, x: Tensor) -> Tensor:
    return call.mlp(x)


def _norm(model: Any, x: Tensor) -> Tensor:
    del model
    return x  # the norm comes after pooling


def _head(model: Any, x: Tensor, size: Tensor | None) -> Tensor:
    rows, columns = model.grid(len(model.transformers) - 1)
    pooled = x.mean(dim=1) if size is None else (x * size).sum(dim=1) / (rows * columns)  # (B, C)
    output: Tensor = model.classify(pooled)
    return output


SRET = Family(
    name="sret",
    modules=("sret",),
    signals=("keys",),
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
    norm=_norm,
    downsample=_downsample,
    raster=True,
)
