"""What a checkpoint layout is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tomexport.errors import CheckpointError

State = Mapping[str, Tensor]
Config = Mapping[str, Any]  # of a JSON file
Names = tuple[tuple[str, str], ...]  # patterns of whole keys, and what they are called
Options = dict[str, Any]  # of a model, as timm's functions take them
# the scores of tokens that are trained beside a model, of whichever kind it is
PREDICTORS = (r"score_predictor\..*", ("dynamicvit", "dtps"))
FLOP_COUNTER = (r"(.*\.)?total_(ops|params)", "left by a FLOP counter")


def _same_names(state: State, source: str) -> dict[str, Tensor]:
    del source
    return dict(state)


@dataclass(frozen=True)
class Layout:
    """How a kind of checkpoint names its weights, and how they are told to be some model's.

    Attributes:
        name: what the layout is called.
        modules: the modules whose models have such checkpoints, as timm's registry calls them.
        recognises: whether a state dict is of this layout.
        rename: (state, source) → the same weights under the names that the models have; the source
            is for messages. Left out where the names are those.
        spare: key patterns that the forward pass of the plain model never reads, and why.
        extras: key patterns of a method's own weights, and the methods that have such.
        methods: the methods whose files are named so, weights of their own or not.
        untold: what of the model its tensors do not tell, so that it has to be named; empty if they
            do.
        said: (config.json beside the file, renamed weights, source) → the options that are
            untold. None where there is no such file.
        preprocessing: preprocessor_config.json beside the file → how images are prepared, or None
            if it does not say.
        may_fit: (name, state) → tells cheaply whether a name can fit.
        options: (name, state, source) → what makes the name's model fit: classes, image size …
        describe: what the shapes say of a model, in words.
        called: what the file calls its architecture → what it is called here.
    """

    name: str
    modules: tuple[str, ...]
    recognises: Callable[[State], bool]
    spare: tuple[tuple[str, str], ...]
    may_fit: Callable[[str, State], bool]
    options: Callable[[str, State, str], Options]
    describe: Callable[[State], str]
    rename: Callable[[State, str], dict[str, Tensor]] = _same_names
    called: Callable[[str], str] = str
    extras: tuple[tuple[str, tuple[str, ...]], ...] = ()
    methods: tuple[str, ...] = ()
    untold: str = ""
    said: Callable[[Config, State, str], Options] | None = None
    preprocessing: Callable[[Config], dict[str, Any] | None] | None = None


def n_classes(state: State) -> int:
    """Return the rows of the head, 0 without one."""
    head = state.get("head.weight", state.get("head.bias"))
    return head.shape[0] if head is not None and head.ndim else 0


def n_blocks(state: State, at: str = "blocks") -> int:
    """Return the length of a list of blocks."""
    return len({key.removeprefix(at).split(".")[1] for key in state if key.startswith(f"{at}.")})


def depths(state: State, lists: Sequence[str]) -> tuple[int, ...]:
    """Return the blocks of each stage, where each has its own list of them."""
    return tuple(n_blocks(state, at) for at in lists)


def renamed(key: str, names: Names) -> str:
    """Return what a key is called by the first pattern that fits, or the key."""
    for pattern, name in names:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, name, key)
    return key


def joined(state: dict[str, Tensor], parts: Sequence[str], source: str) -> Tensor:
    """Take weights out of a state dict that are one layer here, and put their rows together.

    Raises: CheckpointError if one is missing or of another width.
    """
    found = {part: state.pop(part) for part in parts if part in state}
    if missing := [part for part in parts if part not in found]:
        raise CheckpointError(
            f"{source}: {' and '.join(found)} have no {missing[0]} beside them, in the names that "
            "timm would give. Take a checkpoint that was saved whole."
        )
    if len({tensor.shape[1:] for tensor in found.values()}) > 1 or not found[parts[0]].ndim:
        shapes = "; ".join(f"{part} is {tuple(t.shape)}" for part, t in found.items())
        raise CheckpointError(
            f"{source}: {shapes}, so they are no parts of one layer. The file is damaged, or of a "
            "model that is not known here."
        )
    return torch.cat(list(found.values()))
