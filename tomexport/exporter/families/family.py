"""What a model family tells the rewrite: its sites, its signals, its pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from tomexport.plan import ModelCost, Step


class Tokens(NamedTuple):
    """The tokens at a block, and what goes with them.

    Attributes:
        x: (B, N, C).
        size: how many original tokens each stands for, (B, N, 1), or (1, N, 1) where all images
            agree; None where attention is not to weight by it.
        place: (B, N) int64, which token at the start of the stage each stands in the place of;
            None while each stands in its own, and in families whose attention reads no places.
        slot: (B, N at the start of the stage) int32, the token that each of those went to; None
            while nothing was chosen, and in families whose attention needs no grid.
    """

    x: Tensor
    size: Tensor | None = None
    place: Tensor | None = None
    slot: Tensor | None = None


@dataclass(frozen=True)
class Signals:
    """What a block's attention can tell a method.

    Attributes:
        keys, queries, values: (B, H, N, D), as projected: before any normalisation or rotation of
            queries and keys; scaled or not. None where they are not of the tokens.
        normed: (B, N, C), what was projected.
        class_attention: () → (B, H, N), what each head's class token pays to every token, after
            the softmax and with its bias.
    """

    keys: Float[Tensor, "B H N D"] | None = None
    queries: Tensor | None = None
    values: Tensor | None = None
    normed: Tensor | None = None
    class_attention: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Family:
    """A kind of model, as functions over its own submodules.

    Attributes:
        name: what the family is called.
        modules: the modules whose architectures it takes, as timm's registry calls them.
        signals: which of `Signals` its attention gives.
        accepts: whether a model is of this family's class.
        refusal: why a model of this class cannot be reduced correctly, or None.
        prepare: sets up a private copy of the model.
        fold: folds scalings of a copy that will be exported into its weights.
        cost: sites and MACs of a model; the second argument names it.
        input_shape: (channels, height, width) of the image.
        grain: (height, width) in pixels that an image must be a multiple of.
        resize: (model, (height, width)) → sets up a private copy for another image size.
        output: what comes out: "logits" or "features".
        n_read: how many tokens at the front the head reads, or None if it reads all. Of the last
            block only these are computed.
        embed: image → tokens (B, N, C).
        calls: (model, steps of the plan) → what `attention` and `mlp` take, one per step: for most
            families the block; an object may come more than once.
        attention: (call, tokens, n) → x of the first n tokens (None: all) after the attention
            residual, and the signals of all.
        mlp: (call, x) → x after the MLP residual.
        head: (model, x, size or None) → output (B, classes or channels).
        norm: (model, x) → x as it is for dense heads: after the norm, if that comes before pooling.
        features: (model, image) → the same of all tokens, (B, N, C), as the original computes it.
        downsample: (model, stage, x) → the tokens that a stage starts with, from all tokens of the
            stage before; None in families of one stage.
        raster: whether tokens must keep the order of their places in the image, because the
            attention reads it; a merged token stands where its first one stood.
        places: whether attention reads where tokens are from (rotary or relative positions,
            queries convolved), so that it must be told the place of each.
        grid: whether attention convolves the whole grid, so that it must be told which token each
            place's went to.
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
    grain: Callable[[nn.Module], tuple[int, int]]
    resize: Callable[[nn.Module, tuple[int, int]], None]
    output: Callable[[nn.Module], str]
    n_read: Callable[[nn.Module], int | None]
    embed: Callable[[nn.Module, Tensor], Tensor]
    calls: Callable[[nn.Module, Sequence[Step]], Sequence[Any]]
    attention: Callable[[Any, Tokens, int | None], tuple[Tensor, Signals]]
    mlp: Callable[[Any, Tensor], Tensor]
    head: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
    norm: Callable[[Any, Tensor], Tensor] = lambda model, x: model.norm(x)
    features: Callable[[Any, Tensor], Tensor] = lambda model, image: model.forward_features(image)
    downsample: Callable[[nn.Module, int, Tensor], Tensor] | None = None
    raster: bool = False
    places: bool = False
    grid: bool = False


def linear_macs(module: nn.Module | None) -> int:
    """Return the MACs per token of all linear layers of a module."""
    layers = module.modules() if module is not None else ()
    return sum(m.in_features * m.out_features for m in layers if isinstance(m, nn.Linear))


def norm_elements(module: nn.Module | None) -> int:
    """Return the elements per token that the layer norms of a module take in."""
    layers: Iterable[Any] = module.modules() if module is not None else ()
    return sum(math.prod(m.normalized_shape) for m in layers if hasattr(m, "normalized_shape"))


def scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    """Replace the weights, which may be shared, by scaled ones; factors (rows,) or (1,)."""
    linear.weight = nn.Parameter(linear.weight.detach() * factors[:, None])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach() * factors)


def fuse_norms(stem: nn.Module, n: int) -> None:
    """Fold the batch norms bn1 … bn{n} of a stem into its convolutions conv1 … conv{n}."""
    for index in range(1, n + 1):
        conv, norm = getattr(stem, f"conv{index}"), getattr(stem, f"bn{index}")
        setattr(stem, f"conv{index}", nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
        setattr(stem, f"bn{index}", nn.Identity())
