"""The authors' files of VideoMAE's classifiers: timm's, but that keys have no bias."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tomexport.exporter.layouts.layout import Layout, Options, State, n_blocks, n_classes
from tomexport.exporter.models.videomae import VARIANTS

_BIAS = re.compile(r"(blocks\.\d+\.attn\.)q_bias")


def _recognises(state: State) -> bool:
    tubes = state.get("patch_embed.proj.weight")
    return tubes is not None and tubes.ndim == 5 and "fc_norm.weight" in state


def _rename(state: State, source: str) -> dict[str, Tensor]:
    del source
    named = dict(state)
    for key in state:
        if (found := _BIAS.fullmatch(key)) and f"{found[1]}v_bias" in state:
            queries, values = named.pop(key), named.pop(f"{found[1]}v_bias")
            bias = [queries, torch.zeros_like(queries), values]
            named[f"{found[1]}qkv.bias"] = torch.cat(bias)
    return named


def _may_fit(name: str, state: State) -> bool:
    variant = VARIANTS[name]
    return (variant.width, variant.depth) == (state["fc_norm.weight"].shape[0], n_blocks(state))


def _options(name: str, state: State, source: str) -> Options:
    del name, source
    return {"num_classes": n_classes(state)}


def _describe(state: State) -> str:
    return f"VideoMAE of width {state['fc_norm.weight'].shape[0]}"


VIDEOMAE = Layout(
    name="VideoMAE",
    modules=("videomae",),
    recognises=_recognises,
    rename=_rename,
    spare=(),
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
)
