"""The layout of SReT's published checkpoints.

A block that is visited twice is listed twice: `blocks.{4k+2}` is `blocks.{4k}` again. Files that
cannot hold a tensor twice, like safetensors, leave one of the two out.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tomexport.errors import CheckpointError
from tomexport.exporter.layouts.layout import FLOP_COUNTER, Layout, State, n_classes
from tomexport.exporter.models.sret import VARIANTS

_BLOCK = re.compile(r"(transformers\.\d+\.blocks\.)(\d+)(\..+)")


def _recognises(state: State) -> bool:
    return all(
        any(key.startswith(part) for key in state)
        for part in ("patch_embed.conv1.", "transformers.0.blocks.")
    )


def _twin(key: str) -> str | None:
    """Return the other name of a tensor of a shared block."""
    found = _BLOCK.fullmatch(key)
    if found is None or int(found[2]) % 2:
        return None
    index = int(found[2])
    return f"{found[1]}{index + (2 if index % 4 == 0 else -2)}{found[3]}"


def _rename(state: State, source: str) -> dict[str, Tensor]:
    """Give each shared tensor both of its names.

    Raises: CheckpointError if two names hold different values.
    """
    whole = dict(state)
    for key, tensor in state.items():
        twin = _twin(key)
        if twin is None:
            continue
        other = whole.setdefault(twin, tensor)
        if other.shape != tensor.shape or not torch.equal(other, tensor):
            raise CheckpointError(
                f"{source}: {key} and {twin} are two names of one weight of a shared block, but "
                "their values differ. In SReT both visits use the same weights; take a checkpoint "
                "that was saved from the model itself."
            )
    return whole


def _called(word: str) -> str:
    return word.lower().replace("_finetune", "")


def _may_fit(name: str, state: State) -> bool:
    stem = state.get("patch_embed.conv3.weight")
    hidden = state.get("transformers.0.blocks.0.mlp.fc1.weight")
    if stem is None or hidden is None or not (stem.ndim and hidden.ndim):
        return False
    variant = VARIANTS[name]
    width = variant.width * variant.heads[0]
    return (stem.shape[0], hidden.shape[0]) == (width, int(width * variant.mlp))


def _options(name: str, state: State, source: str) -> dict[str, Any]:
    del source
    options: dict[str, Any] = {"num_classes": n_classes(state)}
    position = state.get("pos_embed")
    if position is not None and position.ndim == 4:
        size = (8 * position.shape[2], 8 * position.shape[3])  # the stem has stride 8
        own = VARIANTS[name].img_size
        options |= {} if size == (own, own) else {"img_size": size}
    return options


def _describe(state: State) -> str:
    stem = state.get("patch_embed.conv3.weight")
    hidden = state.get("transformers.0.blocks.0.mlp.fc1.weight")
    known = [f"{t.shape[0]} {what}" for t, what in
             ((stem, "channels after the stem"), (hidden, "in its first MLP"))
             if t is not None and t.ndim]  # fmt: skip
    return f"SReT with {', '.join(known)}" if known else "SReT"


SRET = Layout(
    name="SReT",
    modules=("sret",),
    recognises=_recognises,
    rename=_rename,
    spare=(FLOP_COUNTER,),
    called=_called,
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
)
