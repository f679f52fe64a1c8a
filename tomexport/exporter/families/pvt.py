"""Pyramid vision transformers: `exporter/models/pvt.py`.

What the strided convolutions make of the grid is seen by the tokens left. In the last stage, which
has no such convolution, keys are of the tokens, and weighted by size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tomexport.exporter.families import pyramid
from tomexport.exporter.families.family import (
    Signals,
    Tokens,
    linear_macs,
    norm_elements,
    scale_rows,
)
from tomexport.exporter.families.pyramid import Call
from tomexport.exporter.families.transformer import bias_of_size
from tomexport.exporter.gather import at_places
from tomexport.exporter.models import pvt
from tomexport.plan import Cost


def _fold(model: Any) -> None:
    for call in pyramid.calls(model):
        attn = call.block.attn
        scale_rows(attn.q, torch.tensor([attn.scale]))
        attn.scale = 1.0


def _cost_of(call: Call) -> Cost:
    block, attn = call.block, call.block.attn
    of_queries, of_keys = linear_macs(attn.q) + linear_macs(attn.proj), linear_macs(attn.kv)
    usual: dict[str, Any] = {
        "pair": 2 * attn.q.in_features,
        "after": linear_macs(block.mlp),
        "query": of_queries,
        "norm_before": norm_elements(block.norm1),
        "norm_after": norm_elements(block.norm2),
    }
    if not attn.is_coarser:
        return Cost(before=of_queries + of_keys, **usual)
    n_keys = call.n_patches // attn.sr.stride[0] ** 2
    return Cost(
        before=of_queries,
        keys=n_keys,
        fixed=n_keys * (attn.sr.weight.numel() + of_keys),
        norm_fixed=n_keys * norm_elements(attn.norm),
        **usual,
    )


def _attention(call: Call, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    attn, x = call.block.attn, tokens.x
    h = call.block.norm1(x)
    whole = at_places(h, tokens.slot, call.n_patches) if attn.is_coarser else h
    bias = None if attn.is_coarser or tokens.size is None else bias_of_size(tokens.size)
    out, queries = attn(h[:, :n_out], attn.coarser(whole, call.grid), bias)
    return x[:, :n_out] + out, Signals(queries=queries)


PVT = pyramid.family(
    "pvt", pvt.PVT, fold=_fold, cost_of=_cost_of, attention=_attention
)  # fmt: skip
