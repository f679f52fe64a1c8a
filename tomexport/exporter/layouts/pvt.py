"""The layout of PVT's published checkpoints, plain and with predictors of dTPS."""

from __future__ import annotations

from typing import Any

from tomexport.exporter.layouts.layout import (
    FLOP_COUNTER,
    PREDICTORS,
    Layout,
    State,
    depths,
    n_classes,
)
from tomexport.exporter.layouts.timm import square_side
from tomexport.exporter.models import pvt


def _recognises(state: State) -> bool:
    starts = {key.partition(".")[0] for key in state if "." in key}
    return {"patch_embed1", "block1"} <= starts


def _may_fit(name: str, state: State) -> bool:
    return pvt.VARIANTS[name].depths == depths(state, pvt.PVT.block_lists)


def _options(name: str, state: State, source: str) -> dict[str, Any]:
    del name
    options: dict[str, Any] = {"num_classes": n_classes(state)}
    position = state.get("pos_embed1")
    if position is not None and position.ndim == 3:
        side = pvt.PVT.strides[0] * square_side(position.shape[1], 0, source)
        options |= {} if side == 224 else {"img_size": (side, side)}
    return options


def _describe(state: State) -> str:
    return f"PVT of {' + '.join(map(str, depths(state, pvt.PVT.block_lists)))} blocks"


PVT = Layout(
    name="PVT",
    modules=("pvt",),
    recognises=_recognises,
    spare=(FLOP_COUNTER,),
    called=str.lower,
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
    extras=((PREDICTORS[0], ("dtps",)),),  # DynamicViT drops tokens, and a stage's must come back
)
