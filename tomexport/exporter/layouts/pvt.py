"""The layout of PVT's published checkpoints, plain and with predictors of dTPS."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tomexport.exporter.layouts.layout import PREDICTORS, Layout, State, n_classes
from tomexport.exporter.layouts.timm import square_side
from tomexport.exporter.models.pvt import N_STAGES, STRIDES, VARIANTS


def _recognises(state: State) -> bool:
    starts = {key.partition(".")[0] for key in state if "." in key}
    return {"patch_embed1", "block1"} <= starts


def _rename(state: State, source: str) -> dict[str, Tensor]:
    del source
    return dict(state)


def _depths(state: State) -> tuple[int, ...]:
    """Return the blocks of each stage."""
    stages = (f"block{stage + 1}." for stage in range(N_STAGES))
    return tuple(len({k.split(".")[1] for k in state if k.startswith(s)}) for s in stages)


def _may_fit(name: str, state: State) -> bool:
    return VARIANTS[name].depths == _depths(state)


def _options(name: str, state: State, source: str) -> dict[str, Any]:
    del name
    options: dict[str, Any] = {"num_classes": n_classes(state)}
    position = state.get("pos_embed1")
    if position is not None and position.ndim == 3:
        side = STRIDES[0] * square_side(position.shape[1], 0, source)
        options |= {} if side == 224 else {"img_size": (side, side)}
    return options


def _describe(state: State) -> str:
    return f"PVT of {' + '.join(map(str, _depths(state)))} blocks"


PVT = Layout(
    name="PVT",
    modules=("pvt",),
    recognises=_recognises,
    rename=_rename,
    spare=((r"(.*\.)?total_(ops|params)", "left by a FLOP counter"),),
    called=str.lower,
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
    extras=((PREDICTORS[0], ("dtps",)),),  # DynamicViT drops tokens, and a stage's must come back
)
