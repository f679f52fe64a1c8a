"""What a model family tells the rewrite: its sites, its signals, its pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from tomexport.plan import ModelCost


class Signals(NamedTuple):
    """What a block's attention can tell a method.

    Attributes:
        keys: (B, H, N, D), as projected: before any normalisation of queries and keys.
    """

    keys: Float[Tensor, "B H N D"]


@dataclass(frozen=True)
class Family:
    """A kind of model, as functions over its own submodules.

    Attributes:
        name: what the family is called.
        modules: the timm modules whose architectures it takes.
        signals: which of `Signals` its attention gives.
        accepts: whether a model is of this family's class.
        refusal: why a model of this class cannot be reduced correctly, or None.
        prepare: sets up a private copy of the model.
        fold: folds scalings of a copy that will be exported into its weights.
        cost: sites and MACs of a model; the second argument names it.
        input_shape: (channels, height, width) of the image.
        output: what comes out: "logits" or "features".
        n_read: how many tokens at the front the head reads, or None if it reads all. Of the last
            block only these are computed.
        embed: image → tokens (B, N, C).
        blocks: the block calls, in order; an object may come more than once.
        attention: (block, x, size or None, n) → the first n tokens (None: all) after the
            attention residual, and the signals of all.
        mlp: (block, x) → x after the MLP residual.
        head: (model, x, size or None) → output (B, classes or channels).
    """

    name: str
    modules: tuple[str, ...]
    signals: tuple[str, ...]
    accepts: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str | None]
    prepare: Callable[[nn.Module], None]
    fold: Callable[[nn.Module], None]
    cost: Callable[[nn.Module, str], ModelCost]
    input_shape: Callable[[nn.Module], tuple[int, int, int]]
    output: Callable[[nn.Module], str]
    n_read: Callable[[nn.Module], int | None]
    embed: Callable[[nn.Module, Tensor], Tensor]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    attention: Callable[[nn.Module, Tensor, Tensor | None, int | None], tuple[Tensor, Signals]]
    mlp: Callable[[nn.Module, Tensor], Tensor]
    head: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
