"""The layout of CvT's published checkpoints, plain and with predictors of dTPS.

There are no positions, so that a file does not say what images it was trained on: 224×224 pixels
are taken, unless the user asks for others.
"""

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
from tomexport.exporter.models.cvt import VARIANTS, CvT

_START = "stage0.patch_embed."


def _recognises(state: State) -> bool:
    return all(any(key.startswith(start) for key in state) for start in (_START, "stage0.blocks."))


def _called(word: str) -> str:
    return word.lower().replace("-", "_")


def _widths(state: State) -> tuple[int, ...]:
    """Return the channels of each stage, 0 where they are not said."""
    biases = (state.get(f"{at}.proj.bias") for at in CvT.embeddings)
    return tuple(0 if bias is None else bias.numel() for bias in biases)


def _may_fit(name: str, state: State) -> bool:
    variant = VARIANTS[name]
    found = depths(state, CvT.block_lists), _widths(state)
    return (variant.depths, variant.widths) == found


def _options(name: str, state: State, source: str) -> dict[str, Any]:
    del name, source
    return {"num_classes": n_classes(state)}


def _describe(state: State) -> str:
    sizes = depths(state, CvT.block_lists), _widths(state)
    blocks, channels = (" + ".join(map(str, each)) for each in sizes)
    return f"CvT of {blocks} blocks, {channels} channels wide"


CVT = Layout(
    name="CvT",
    modules=("cvt",),
    recognises=_recognises,
    spare=(FLOP_COUNTER,),
    called=_called,
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
    extras=((PREDICTORS[0], ("dtps",)),),  # DynamicViT drops tokens, and a stage's must come back
)
