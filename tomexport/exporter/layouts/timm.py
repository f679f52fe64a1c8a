"""timm's own layout, which DeiT, AugReg and most published ViT checkpoints share."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from tomexport.errors import CheckpointError
from tomexport.exporter.layouts.layout import PREDICTORS, Layout, State, n_classes
from tomexport.exporter.zoo import skeleton


def _recognises(state: State) -> bool:
    return all(any(key.startswith(part) for key in state) for part in ("patch_embed.", "blocks."))


def _rename(state: State, source: str) -> dict[str, Tensor]:
    del source
    return dict(state)


def _called(word: str) -> str:
    return word


def _may_fit(name: str, state: State) -> bool:
    """Tell cheaply, from one block, whether a name can fit."""
    model: Any = skeleton(name, depth=1)
    expected = {k: v.shape for k, v in model.state_dict().items() if k.startswith("blocks.0.")}
    found = {k: v.shape for k, v in state.items() if k.startswith("blocks.0.")}
    n_shared = sum(found.get(key) == shape for key, shape in expected.items())
    return bool(n_shared >= 0.5 * max(len(expected), 1))


def _options(name: str, state: State, source: str) -> dict[str, Any]:
    """Return the options that make a timm name fit the weights: classes, image size, pooling."""
    model: Any = skeleton(name)
    options: dict[str, Any] = {"num_classes": n_classes(state)}
    has_fc_norm, expects_fc_norm = "fc_norm.weight" in state, _has(model, "fc_norm.weight")
    is_distilled = hasattr(model, "dist_token")  # always pools its two tokens
    if has_fc_norm and not expects_fc_norm and "norm.weight" not in state and not is_distilled:
        options["global_pool"] = "avg"
    if expects_fc_norm and not has_fc_norm and "norm.weight" in state and model.has_class_token:
        options["global_pool"] = "token"
    position = state.get("pos_embed")
    if position is not None and model.pos_embed is not None and position.ndim == 3:
        n_position = position.shape[1]
        if n_position != model.pos_embed.shape[1]:
            options["img_size"] = _image_size(model, n_position, source)
    return options


def _has(model: nn.Module, key: str) -> bool:
    return any(key == name for name, _ in model.named_parameters())


def _image_size(model: Any, n_position: int, source: str) -> tuple[int, int]:
    n_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = square_side(n_position, n_prefix, source)
    height, width = model.patch_embed.patch_size
    return side * height, side * width


def square_side(n_position: int, n_prefix: int, source: str) -> int:
    """Return the side of the square grid of patches that positions are of.

    Raises: CheckpointError if they are of no such grid.
    """
    n_patches = n_position - n_prefix
    side = math.isqrt(max(n_patches, 0))
    if side * side != n_patches or side == 0:
        raise CheckpointError(
            f"{source}: pos_embed has {n_position} positions; without the {n_prefix} prefix "
            f"tokens that is {n_patches}, which is no square grid of patches."
        )
    return side


def _describe(state: State) -> str:
    n_blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    projection = state.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        return f"{n_blocks} blocks"
    width, channels, *patch = projection.shape
    size = "×".join(map(str, patch))
    return f"width {width}, {n_blocks} blocks, patches of {size}×{channels}"


TIMM = Layout(
    name="timm",
    modules=("vision_transformer", "deit"),
    recognises=_recognises,
    rename=_rename,
    spare=(
        (r"mask_token", "used in pre-training only"),
        (r"decoder_.*|decoder\..*", "the decoder of pre-training"),
        (r"(.*\.)?total_(ops|params)", "left by a FLOP counter"),
        (r"n_averaged", "the count of an averaged model"),
        (r"blocks\.\d+\.attn\.out_zero_mask", "zero mask of ATS"),
    ),
    called=_called,
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
    extras=(PREDICTORS,),
)
