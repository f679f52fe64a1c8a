"""What a checkpoint layout is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]
# the scores of tokens that are trained beside a model, of whichever kind it is
PREDICTORS = (r"score_predictor\..*", ("dynamicvit", "dtps"))


@dataclass(frozen=True)
class Layout:
    """How a kind of checkpoint names its weights, and how they are told to be some model's.

    Attributes:
        name: what the layout is called.
        modules: the modules whose models have such checkpoints, as timm's registry calls them.
        recognises: whether a state dict is of this layout.
        rename: (state, source) → the same weights under the names that the models have; the source
            is for messages.
        spare: key patterns that the forward pass of the plain model never reads, and why.
        extras: key patterns of a method's own weights, and the methods that have such.
        methods: the methods whose files are named so, weights of their own or not.
        called: what the file calls its architecture → what it is called here.
        may_fit: (name, state) → tells cheaply whether a name can fit.
        options: (name, state, source) → what makes the name's model fit: classes, image size …
        describe: what the shapes say of a model, in words.
    """

    name: str
    modules: tuple[str, ...]
    recognises: Callable[[State], bool]
    rename: Callable[[State, str], dict[str, Tensor]]
    spare: tuple[tuple[str, str], ...]
    called: Callable[[str], str]
    may_fit: Callable[[str, State], bool]
    options: Callable[[str, State, str], dict[str, Any]]
    describe: Callable[[State], str]
    extras: tuple[tuple[str, tuple[str, ...]], ...] = ()
    methods: tuple[str, ...] = ()


def n_classes(state: State) -> int:
    """Return the rows of the head, 0 without one."""
    head = state.get("head.weight", state.get("head.bias"))
    return head.shape[0] if head is not None and head.ndim else 0
