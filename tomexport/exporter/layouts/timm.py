"""timm's own layouts; that of DeiT, AugReg and most published ViT checkpoints is one of them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from tomexport.errors import CheckpointError
from tomexport.exporter.layouts.layout import (
    FLOP_COUNTER,
    PREDICTORS,
    Layout,
    State,
    n_blocks,
    n_classes,
)
from tomexport.exporter.zoo import blocks_only, module_of, skeleton

_TABLE = "relative_position_bias_table"
# modules whose embeddings have other keys than the rest
_MARKS = {"vision_transformer_hybrid": "patch_embed.backbone.", "naflexvit": "embeds."}


def _recognises(state: State) -> bool:
    starts = {key.partition(".")[0] for key in state if "." in key}
    return "blocks" in starts and bool(starts & {"patch_embed", "embeds"})  # the latter is NaFlex's


def _rename(state: State, source: str) -> dict[str, Tensor]:
    del source
    return dict(state)


def _called(word: str) -> str:
    return word


def _may_fit(name: str, state: State) -> bool:
    """Tell cheaply, from the embedding and one block, whether a name can fit."""
    marked = [module for module, start in _MARKS.items() if any(k.startswith(start) for k in state)]
    module = module_of(name)
    if (marked or module in _MARKS) and module not in marked:
        return False
    model: Any = skeleton(name, **blocks_only(name, 1))
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
    has_class_token = getattr(
        model, "has_class_token", getattr(model, "cls_token", None) is not None
    )
    if expects_fc_norm and not has_fc_norm and "norm.weight" in state and has_class_token:
        options["global_pool"] = "token"
    side = _side_of_positions(model, state, source) or _side_of_distances(model, state)
    if side is not None:
        height, width = model.patch_embed.feat_ratio(as_scalar=False)
        options["img_size"] = (side * height, side * width)
    return options


def _side_of_positions(model: Any, state: State, source: str) -> int | None:
    """Return the patches along a side, if the weights have other positions than the model."""
    position, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if position is None or own is None or position.ndim != 3:
        return None
    n_position = position.shape[1]
    if n_position == own.shape[1]:
        return None
    n_prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    return square_side(n_position, n_prefix, source)


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


def _side_of_distances(model: Any, state: State) -> int | None:
    """Return the same for a table of relative positions, from 1 − side to side − 1 each way."""
    own = {key: tensor.shape for key, tensor in model.state_dict().items() if key.endswith(_TABLE)}
    for key in own.keys() & state.keys():
        side = math.isqrt(max(state[key].shape[0] - 3 * model.num_prefix_tokens, 0))
        return (side + 1) // 2 if state[key].shape != own[key] else None
    return None


def _has(model: nn.Module, key: str) -> bool:
    return any(key == name for name, _ in model.named_parameters())


def _describe(state: State) -> str:
    blocks = f"{n_blocks(state)} blocks"
    projection = state.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        return blocks
    width, channels, *patch = projection.shape
    size = "×".join(map(str, patch))
    return f"width {width}, {blocks}, patches of {size}×{channels}"


TIMM = Layout(
    name="timm",
    modules=(
        "vision_transformer",
        "deit",
        "vision_transformer_hybrid",
        "eva",
        "beit",
        "vision_transformer_relpos",
        "naflexvit",
    ),
    recognises=_recognises,
    rename=_rename,
    spare=(
        (r"mask_token", "used in pre-training only"),
        (r"decoder_.*|decoder\..*", "the decoder of pre-training"),
        FLOP_COUNTER,
        (r"n_averaged", "the count of an averaged model"),
        (r"blocks\.\d+\.attn\.out_zero_mask", "zero mask of ATS"),
    ),
    called=_called,
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
    extras=(PREDICTORS,),
)
