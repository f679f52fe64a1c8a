"""torchvision's layout of a vision transformer, and SWAG's, which is a relative of it.

SWAG (Singh et al., CVPR 2022, github.com/facebookresearch/SWAG) numbers its layers otherwise, has
the positions along the first axis, and names the head's layer by its place.
"""

from __future__ import annotations

import dataclasses
import re

from torch import Tensor

from tomexport.exporter.layouts.layout import Names, State, renamed
from tomexport.exporter.layouts.timm import TIMM

_BLOCK = r"encoder\.layers\.(?:encoder_)?layer_(\d+)\."
_NAMES: Names = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (rf"{_BLOCK}ln_([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (rf"{_BLOCK}self_attention\.in_proj_(.+)", r"blocks.\1.attn.qkv.\2"),
    (rf"{_BLOCK}self_attention\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}mlp\.(?:linear_1|0)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}mlp\.(?:linear_2|3)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(.+)", r"norm.\1"),
    (r"(?:heads\.head|head\.layers\.head)\.(.+)", r"head.\1"),
)


def _recognises(state: State) -> bool:
    return "encoder.pos_embedding" in state and any(re.match(_BLOCK, key) for key in state)


def _rename(state: State, source: str) -> dict[str, Tensor]:
    del source
    named = {renamed(key, _NAMES): tensor for key, tensor in state.items()}
    position = named["pos_embed"]
    if position.ndim == 3 and position.shape[1] == 1:  # SWAG's, (N, 1, C)
        named["pos_embed"] = position.transpose(0, 1)
    return named


SWAG = dataclasses.replace(
    TIMM,
    name="SWAG's or torchvision's",
    modules=("vision_transformer", "deit"),
    recognises=_recognises,
    rename=_rename,
    extras=(),
)
