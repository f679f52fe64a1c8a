"""The authors' files of DeiT III, in which the LayerScales are parameters of the blocks.

Source: Touvron et al., "DeiT III: Revenge of the ViT", ECCV 2022
(github.com/facebookresearch/deit).
"""

from __future__ import annotations

import dataclasses
import re

from torch import Tensor

from tomexport.exporter.layouts.layout import State
from tomexport.exporter.layouts.timm import TIMM

_SCALE = re.compile(r"(blocks\.\d+)\.gamma_([12])")
_BIAS = "blocks.0.attn.qkv.bias"  # BEiT, which has such parameters too, has another


def _recognises(state: State) -> bool:
    return TIMM.recognises(state) and "blocks.0.gamma_1" in state and _BIAS in state


def _rename(state: State, source: str) -> dict[str, Tensor]:
    named = {_SCALE.sub(r"\1.ls\2.gamma", key): tensor for key, tensor in state.items()}
    return TIMM.rename(named, source)


DEIT3 = dataclasses.replace(
    TIMM,
    name="DeiT III",
    modules=("deit", "vision_transformer"),
    recognises=_recognises,
    rename=_rename,
    untold="DeiT III from its relatives with rotary positions (vit_small_patch16_rope_ape_224 …)",
)
