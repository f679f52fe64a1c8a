"""Hugging Face's ViT and DeiT, as the library writes them and as its models hold them.

The pooler of a model without a classifier is left out: its output is the class token after the
norm. DeiT with a distillation token and one classifier reads the class token alone; to timm its
second token is a register.
"""

from __future__ import annotations

from torch import Tensor

from tomexport.exporter.layouts.huggingface import (
    PATCHES_FIRST,
    Defaults,
    as_timm,
    has,
    layout,
)
from tomexport.exporter.layouts.layout import Options, State
from tomexport.exporter.layouts.timm import TIMM

_PREFIX = r"(?:vit|deit)\."
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
_SECOND = "embeddings.distillation_token"
_NAMES = (
    *PATCHES_FIRST,
    (rf"{_LAYER}layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
    (rf"{_LAYER}layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
    (rf"{_LAYER}(?:intermediate\.dense|mlp\.fc1)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_LAYER}(?:output\.dense|mlp\.fc2)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:cls_)?classifier\.(.+)", r"head.\1"),
    (r"distillation_classifier\.(.+)", r"head_dist.\1"),
)


def _recognises(state: State) -> bool:
    keys = ("embeddings.patch_embeddings.projection.weight", "layernorm.weight")
    layers = ("encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight")
    return all(has(state, _PREFIX, key) for key in keys) and any(
        has(state, _PREFIX, key) for key in layers
    )


def _rename(state: State, source: str) -> dict[str, Tensor]:
    named = as_timm(state, _PREFIX, _NAMES, source)
    if _SECOND in named:
        called = "dist_token" if "head_dist.weight" in named else "reg_token"
        named[called] = named.pop(_SECOND)
    return named


def _options(name: str, state: State, source: str) -> Options:
    position = state.get("pos_embed")
    if "reg_token" not in state or position is None or position.ndim != 3:
        return TIMM.options(name, state, source)
    one_less = {**state, "pos_embed": position[:, 1:]}  # timm's own has no such token
    return TIMM.options(name, one_less, source) | {"reg_tokens": 1}


HF_VIT = layout(
    "ViT or DeiT",
    Defaults(types=("vit", "deit"), activation="gelu", epsilon=1e-12),
    recognises=_recognises,
    rename=_rename,
    spare=(
        (r"mask_token", "used in pre-training only"),
        (r"pooler\..+", "the pooler, which classifiers do not have"),
    ),
    options=_options,
)
