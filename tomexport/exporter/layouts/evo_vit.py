"""Evo-ViT's layout: the parts of each attention lie beside the blocks, and tokens are averaged."""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor

from tomexport.errors import CheckpointError
from tomexport.exporter.layouts.layout import State
from tomexport.exporter.layouts.timm import TIMM

_VALUES = re.compile(r"vs\.\d+\.v\..+")
_NAMES = (
    (re.compile(r"qks\.(\d+)\.qk\."), r"blocks.\1.attn.qkv."),
    (re.compile(r"norms\.(\d+)\."), r"blocks.\1.norm1."),
    (re.compile(r"projs\.(\d+)\."), r"blocks.\1.attn.proj."),
    (re.compile(r"norm\."), "fc_norm."),  # it follows the average
)


def _recognises(state: State) -> bool:
    return TIMM.recognises(state) and any(key.startswith("qks.") for key in state)


def _rename(state: State, source: str) -> dict[str, Tensor]:
    """Put keys, queries and values together.

    Raises: CheckpointError if the values of a block are missing or of another width.
    """
    named = {}
    for key, tensor in state.items():
        if _VALUES.fullmatch(key):
            continue
        name = key
        for pattern, other in _NAMES:
            if pattern.match(key):
                name = pattern.sub(other, key, count=1)
        named[name] = _with_values(state, key, source) if key.startswith("qks.") else tensor
    return TIMM.rename(named, source)


def _with_values(state: State, key: str, source: str) -> Tensor:
    name = key.replace("qks.", "vs.").replace(".qk.", ".v.")
    found, values = state[key], state.get(name)
    if values is None or not found.ndim or found.shape[1:] != values.shape[1:]:
        shape = "missing" if values is None else f"of {tuple(values.shape)}"
        raise CheckpointError(
            f"{source}: queries and keys are there ({key}, of {tuple(found.shape)}), but their "
            f"values ({name}) are {shape}. Take a checkpoint that was saved whole."
        )
    return torch.cat([found, values])


EVO_VIT = dataclasses.replace(
    TIMM,
    name="Evo-ViT",
    recognises=_recognises,
    rename=_rename,
    spare=(*TIMM.spare, (r"(head|norm)_cls\..+", "read in training only")),
    extras=(),
    methods=("evo-vit",),
)
