"""Convolutional vision transformers: `exporter/models/cvt.py`.

The depthwise convolutions of keys and values make theirs of the whole grid. Of what that of the
queries makes, the places are read that the tokens left stand in, and projected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tomexport.exporter.families import pyramid
from tomexport.exporter.families.family import (
    Signals,
    Tokens,
    linear_macs,
    norm_elements,
    scale_rows,
)
from tomexport.exporter.families.pyramid import Call
from tomexport.exporter.gather import at_places, rows
from tomexport.exporter.models import cvt
from tomexport.plan import Cost


def _fold(model: Any) -> None:
    for call in pyramid.calls(model):
        attn = call.block.attn
        for depthwise in (attn.conv_proj_q, attn.conv_proj_k, attn.conv_proj_v):
            fused = nn.utils.fusion.fuse_conv_bn_eval(depthwise.conv, depthwise.bn)
            depthwise.conv, depthwise.bn = fused, nn.Identity()
        scale_rows(attn.proj_q, torch.tensor([attn.scale]))
        attn.scale = 1.0


def _cost_of(call: Call) -> Cost:
    block, attn = call.block, call.block.attn
    width = attn.proj.in_features
    of_queries = linear_macs(attn.proj_q) + linear_macs(attn.proj)
    of_keys = linear_macs(attn.proj_k) + linear_macs(attn.proj_v)
    n_rows, n_columns = (-(-side // cvt.KEY_STRIDE) for side in call.grid)
    n_convolved, n_keys = n_rows * n_columns, n_rows * n_columns + call.n_prefix
    query_conv = call.n_patches * attn.conv_proj_q.conv.weight.numel()
    key_convs = 2 * n_convolved * attn.conv_proj_k.conv.weight.numel()
    return Cost(
        before=of_queries,
        pair=2 * width,
        after=linear_macs(block.mlp),
        query=of_queries,
        norm_before=norm_elements(block.norm1),
        norm_after=norm_elements(block.norm2),
        keys=n_keys,
        fixed=query_conv + key_convs + n_keys * of_keys,
        fixed_query=query_conv,
        norm_fixed=(call.n_patches + 2 * n_convolved) * width,
    )


def _attention(call: Call, tokens: Tokens, n_out: int | None) -> tuple[Tensor, Signals]:
    attn, x = call.block.attn, tokens.x
    h = call.block.norm1(x)
    whole = at_places(h, tokens.slot, call.n_prefix + call.n_patches)
    if n_out is None:
        asking = attn.queries_of(whole, call.grid)
        asking = asking if tokens.place is None else rows(asking, tokens.place)
    else:
        asking = h[:, :n_out]  # class tokens, which no convolution takes
    out, queries = attn(asking, whole, call.grid)
    return x[:, :n_out] + out, Signals(queries=queries)


CVT = pyramid.family(
    "cvt", cvt.CvT, fold=_fold, cost_of=_cost_of, attention=_attention, places=True
)  # fmt: skip
