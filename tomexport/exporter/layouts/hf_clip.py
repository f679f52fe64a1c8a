"""The vision tower of Hugging Face's CLIP, alone or in a file with its text tower.

The projection is a head without bias. A classifier reads the mean of the patches before the last
norm, as CLIPForImageClassification does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tomexport.exporter.layouts.huggingface import (
    TOWER,
    TOWER_SPARE,
    Defaults,
    as_timm,
    has,
    layout,
)
from tomexport.exporter.layouts.layout import Options, State
from tomexport.exporter.layouts.timm import TIMM

_PREFIX = r"vision_model\."
_PATCHES = {"global_pool": "avg", "fc_norm": False, "final_norm": False}
_NAMES = (
    *TOWER,
    (r"embeddings\.class_embedding", "cls_token"),
    (r"pre_layrnorm\.(.+)", r"norm_pre.\1"),  # so spelt there
    (r"visual_projection\.weight", "head.weight"),
    (r"classifier\.(.+)", r"head.\1"),
)


def _recognises(state: State) -> bool:
    return has(state, _PREFIX, "pre_layrnorm.weight")


def _classifies(state: State) -> bool:
    return "classifier.weight" in state


def _rename(state: State, source: str) -> dict[str, Tensor]:
    named = as_timm(state, _PREFIX, _NAMES, source)
    if "cls_token" in named:
        named["cls_token"] = named["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in named:
        named["pos_embed"] = named["pos_embed"][None]
    if _classifies(state):
        named = {f"unread.{k}" if k.startswith("norm.") else k: t for k, t in named.items()}
    elif "head.weight" in named:
        named["head.bias"] = torch.zeros(named["head.weight"].shape[:1])
    return named


def _options(name: str, state: State, source: str) -> Options:
    options = TIMM.options(name, state, source)
    return options if "norm.weight" in state else options | _PATCHES


HF_CLIP = layout(
    "CLIP",
    Defaults(("clip", "clip_vision_model"), activation="quick_gelu", epsilon=1e-5),
    recognises=_recognises,
    rename=_rename,
    spare=(*TOWER_SPARE, (r"unread\..+", "a norm that the classifier comes before")),
    options=_options,
)
