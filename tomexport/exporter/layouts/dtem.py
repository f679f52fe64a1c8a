"""DTEM's layout: timm's, with an embedding beside the projections of each block.

The file holds each projection twice: `qkv.qkv_layer` and `qkv.metric_layer`, which are trained, and
both in one as `qkv` itself, which is as old as the last evaluation. The first two are read.
"""

from __future__ import annotations

import dataclasses
import re

from torch import Tensor

from tomexport.exporter.layouts.layout import State
from tomexport.exporter.layouts.timm import TIMM

_BLOCK = r"blocks\.\d+\.attn\.qkv"
_FUSED = re.compile(rf"{_BLOCK}\.(weight|bias)")
_EMBEDDING = rf"{_BLOCK}\.metric_layer\.(weight|bias)"


def _recognises(state: State) -> bool:
    return TIMM.recognises(state) and any(re.fullmatch(_EMBEDDING, key) for key in state)


def _rename(state: State, source: str) -> dict[str, Tensor]:
    trained = {key: tensor for key, tensor in state.items() if not _FUSED.fullmatch(key)}
    named = {key.replace(".qkv.qkv_layer.", ".qkv."): tensor for key, tensor in trained.items()}
    return TIMM.rename(named, source)


DTEM = dataclasses.replace(
    TIMM,
    name="DTEM",
    recognises=_recognises,
    rename=_rename,
    extras=((_EMBEDDING, ("dtem",)),),
)
