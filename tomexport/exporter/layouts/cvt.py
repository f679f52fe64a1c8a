"""The layout of CvT's published checkpoints, plain and with predictors of dTPS.

There are no positions, so that a file does not say what images it was trained on: 224×224 pixels
are taken, unless the user asks for others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tomexport.exporter.layouts.layout import PREDICTORS, Layout, State, n_classes
from tomexport.exporter.models.cvt import N_STAGES, VARIANTS

_START = "stage0.patch_embed."


def _recognises(state: State) -> bool:
    return all(any(key.startswith(start) for key in state) for start in (_START, "stage0.blocks."))


def _rename(state: State, source: str) -> dict[str, Tensor]:
    del source
    return dict(state)


def _called(word: str) -> str:
    return word.lower().replace("-", "_")


def _depths(state: State) -> tuple[int, ...]:
    """Return the blocks of each stage."""
    stages = (f"stage{stage}.blocks." for stage in range(N_STAGES))
    return tuple(len({k.split(".")[2] for k in state if k.startswith(s)}) for s in stages)


def _widths(state: State) -> tuple[int, ...]:
    """Return the channels of each stage, 0 where they are not said."""
    biases = (state.get(f"stage{stage}.patch_embed.proj.bias") for stage in range(N_STAGES))
    return tuple(0 if bias is None else bias.numel() for bias in biases)


def _may_fit(name: str, state: State) -> bool:
    variant = VARIANTS[name]
    return (variant.depths, variant.widths) == (_depths(state), _widths(state))


def _options(name: str, state: State, source: str) -> dict[str, Any]:
    del name, source
    return {"num_classes": n_classes(state)}


def _describe(state: State) -> str:
    depths, widths = (" + ".join(map(str, each)) for each in (_depths(state), _widths(state)))
    return f"CvT of {depths} blocks, {widths} channels wide"


CVT = Layout(
    name="CvT",
    modules=("cvt",),
    recognises=_recognises,
    rename=_rename,
    spare=((r"(.*\.)?total_(ops|params)", "left by a FLOP counter"),),
    called=_called,
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
    extras=((PREDICTORS[0], ("dtps",)),),  # DynamicViT drops tokens, and a stage's must come back
)
