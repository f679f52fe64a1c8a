"""The layout of LV-ViT's published checkpoints, plain and with predictors of DynamicViT."""

from __future__ import annotations

from typing import Any

from tomexport.exporter.layouts.layout import (
    FLOP_COUNTER,
    PREDICTORS,
    Layout,
    State,
    n_blocks,
    n_classes,
)
from tomexport.exporter.layouts.timm import square_side
from tomexport.exporter.models.lvvit import PATCH, VARIANTS


def _recognises(state: State) -> bool:
    return "patch_embed.conv1.weight" in state and any(key.startswith("blocks.") for key in state)


def _called(word: str) -> str:
    return word.lower().replace("lv_vit", "lvvit")


def _sizes(state: State) -> tuple[int, int]:
    """Return the channels, 0 if they are not said, and the blocks."""
    token = state.get("cls_token")
    width = token.shape[-1] if token is not None and token.ndim else 0
    return width, n_blocks(state)


def _may_fit(name: str, state: State) -> bool:
    variant = VARIANTS[name]
    return (variant.width, variant.depth) == _sizes(state)


def _options(name: str, state: State, source: str) -> dict[str, Any]:
    del name
    options: dict[str, Any] = {"num_classes": n_classes(state)}
    position = state.get("pos_embed")
    if position is not None and position.ndim == 3:
        side = PATCH * square_side(position.shape[1], 1, source)
        options |= {} if side == 224 else {"img_size": (side, side)}
    return options


def _describe(state: State) -> str:
    width, depth = _sizes(state)
    return f"LV-ViT of width {width}, {depth} blocks"


LVVIT = Layout(
    name="LV-ViT",
    modules=("lvvit",),
    recognises=_recognises,
    spare=(FLOP_COUNTER,),
    called=_called,
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
    extras=(PREDICTORS,),
)
