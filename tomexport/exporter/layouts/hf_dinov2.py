"""Hugging Face's Dinov2, with register tokens and without.

With registers, timm adds no position to them nor to the class token, whose position is added here.
"""

from __future__ import annotations

import dataclasses
import re

from torch import Tensor

from tomexport.errors import CheckpointError
from tomexport.exporter.layouts.huggingface import (
    PATCHES_FIRST,
    Defaults,
    as_timm,
    has,
    layout,
)
from tomexport.exporter.layouts.layout import Config, Options, State, joined

_PREFIX = r"dinov2(?:_with_registers)?\."
_LAYER = r"encoder\.layer\.(\d+)\."
_NAMES = (
    *PATCHES_FIRST,
    (r"embeddings\.register_tokens", "reg_token"),
    (rf"{_LAYER}(norm[12])\.(.+)", r"blocks.\1.\2.\3"),
    (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (rf"{_LAYER}mlp\.(?:fc1|weights_in)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_LAYER}mlp\.(?:fc2|weights_out|down_proj)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (rf"{_LAYER}mlp\.gate_proj\.(.+)", r"blocks.\1.mlp.gate.\2"),
    (rf"{_LAYER}mlp\.up_proj\.(.+)", r"blocks.\1.mlp.up.\2"),
)
_SWIGLU = "use_swiglu_ffn"  # of config.json
_GATE = re.compile(r"(blocks\.\d+\.mlp\.)gate\.(.+)")


def _recognises(state: State) -> bool:
    return has(state, _PREFIX, "encoder.layer.0.layer_scale1.lambda1")


def _rename(state: State, source: str) -> dict[str, Tensor]:
    """Name weights as timm does.

    Raises: CheckpointError for a classifier, which reads two vectors.
    """
    if "classifier.weight" in state:
        raise CheckpointError(
            f"{source} has the classifier of Hugging Face's Dinov2, which reads the class token "
            "and the mean of the patches side by side; no pooling here gives both. Save the "
            "backbone alone, torch.save(model.dinov2.state_dict(), path), and classify its output."
        )
    named = as_timm(state, _PREFIX, _NAMES, source)
    for key in list(named):
        if found := _GATE.fullmatch(key):
            parts = [key, f"{found[1]}up.{found[2]}"]
            named[f"{found[1]}fc1.{found[2]}"] = joined(named, parts, source)
    position, token = named.get("pos_embed"), named.get("cls_token")
    if "reg_token" in named and position is not None and token is not None and position.ndim == 3:
        named["cls_token"], named["pos_embed"] = token + position[:, :1], position[:, 1:]
    return named


_PLAIN = layout(
    "Dinov2",
    Defaults(types=("dinov2", "dinov2_with_registers"), activation="gelu", epsilon=1e-6),
    recognises=_recognises,
    rename=_rename,
    spare=((r"mask_token", "used in pre-training only"),),
)


def _said(config: Config, state: State, source: str) -> Options:
    """Read a config.json; a gated MLP has its own activation, whatever it says."""
    assert _PLAIN.said is not None
    options = _PLAIN.said(config, state, source)
    return {k: v for k, v in options.items() if k != "act_layer" or not config.get(_SWIGLU)}


HF_DINOV2 = dataclasses.replace(_PLAIN, said=_said)
