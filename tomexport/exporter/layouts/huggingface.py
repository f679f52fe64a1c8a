"""What the layouts of Hugging Face's transformers have in common.

Queries, keys and values are layers of their own. The tensors do not tell the epsilon of the norms,
the activation or the number of heads; the `config.json` beside a file does, and where there is
none the user has to name an architecture that has the right ones.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from tomexport.errors import CheckpointError
from tomexport.exporter.layouts.layout import Layout, Names, Options, State, joined, renamed
from tomexport.exporter.layouts.timm import TIMM

_ACTIVATIONS: Mapping[str, Any] = {
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": "quick_gelu",  # as timm calls it
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
_INTERPOLATIONS = {
    "0": "nearest",
    "1": "lanczos",
    "2": "bilinear",
    "3": "bicubic",
}  # as Pillow counts them
_SPLIT = re.compile(r"(blocks\.\d+\.attn\.)q\.(weight|bias)")
# names of two of the dialects: (pattern of a whole key, what it is called in timm)
PATCHES_FIRST: Names = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.mask_token", "mask_token"),
    (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:attention\.(q)uery|(q)_proj)\.(.+)",
     r"blocks.\1.attn.q.\4"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:attention\.(k)ey|(k)_proj)\.(.+)",
     r"blocks.\1.attn.k.\4"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:attention\.(v)alue|(v)_proj)\.(.+)",
     r"blocks.\1.attn.v.\4"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(.+)",
     r"blocks.\1.attn.proj.\2"),
    (r"layernorm\.(.+)", r"norm.\1"),
    (r"pooler\.dense\.(.+)", r"pooler.\1"),
)  # fmt: skip
TOWER: Names = (
    (r"embeddings\.position_ids", "position_ids"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"embeddings\.patch_embedding\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(.+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(.+)", r"blocks.\1.mlp.\2.\3"),
    (r"post_layernorm\.(.+)", r"norm.\1"),
)
TOWER_SPARE = (
    (r"text_model\..+|text_projection\..+|logit_(scale|bias)", "the text tower"),
    (r"position_ids", "the numbers of the positions"),
)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a `config.json` means by what it leaves out.

    Attributes:
        types: its `model_type`, of the model or of its vision tower.
        activation, epsilon: of the kind, as its documentation says.
    """

    types: tuple[str, ...]
    activation: str
    epsilon: float


def as_timm(state: State, prefix: str, names: Names, source: str) -> dict[str, Tensor]:
    """Name weights as timm does, and put queries, keys and values together.

    Args:
        state: as the file has it.
        prefix: pattern of what may stand before each key.
        names: patterns of keys without it; those that none fits stay as they are.
        source: the file, for messages.

    Raises: CheckpointError if queries, keys and values do not go together.
    """
    named = {renamed(re.sub(f"^(?:{prefix})", "", key), names): t for key, t in state.items()}
    for key in list(named):
        if found := _SPLIT.fullmatch(key):
            parts = [f"{found[1]}{part}.{found[2]}" for part in "qkv"]
            named[f"{found[1]}qkv.{found[2]}"] = joined(named, parts, source)
    return named


def has(state: State, prefix: str, key: str) -> bool:
    """Tell whether a key is there, with or without what may stand before it."""
    return any(re.fullmatch(f"(?:{prefix})?{re.escape(key)}", name) for name in state)


def said(defaults: Defaults) -> Callable[[Mapping[str, Any], State, str], Options]:
    """Return how a `config.json` is read; see `Layout.said`."""

    def read(config: Mapping[str, Any], state: State, source: str) -> Options:
        from timm.layers import LayerNorm

        tower = config.get("vision_config")
        tower = tower if isinstance(tower, Mapping) else config
        kinds = [str(each.get("model_type")) for each in (config, tower)]
        if not set(kinds) & set(defaults.types):
            raise CheckpointError(
                f"The config.json beside {source} is of a model of type {kinds[0]!r}, but the keys "
                f"are those of {' or '.join(defaults.types)}. Put the file's own config.json there."
            )
        activation = str(tower.get("hidden_act", defaults.activation))
        if activation not in _ACTIVATIONS:
            raise CheckpointError(
                f"The config.json beside {source} asks for the activation {activation!r}; known: "
                f"{', '.join(_ACTIVATIONS)}. Build the model in Python and pass it."
            )
        width = state["norm.weight"].numel() if "norm.weight" in state else 0
        heads, epsilon = tower.get("num_attention_heads", 12), tower.get("layer_norm_eps")
        epsilon = defaults.epsilon if epsilon is None else epsilon
        sound = isinstance(heads, int) and heads > 0 and width % heads == 0
        if not sound or not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise CheckpointError(
                f"The config.json beside {source} says {heads} heads and an epsilon of {epsilon}, "
                f"which a width of {width} cannot have. Put the file's own config.json there."
            )
        return {
            "num_heads": heads,
            "act_layer": _ACTIVATIONS[activation],
            "norm_layer": partial(LayerNorm, eps=epsilon),
        }

    return read


def preprocessing(processor: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a `preprocessor_config.json` says, as timm says it; None if that cannot be.

    One side resizes the shorter edge, then crops the centre; two sides squash the image.
    """
    size, crop = processor.get("size"), processor.get("crop_size")
    mean, std = processor.get("image_mean"), processor.get("image_std")
    kind = _INTERPOLATIONS.get(str(processor.get("resample", 2)))
    squashed = _sides(size)
    short = size.get("shortest_edge") if isinstance(size, Mapping) else None
    sides = squashed or _sides(crop) or _sides(short)
    steps = (f"do_{step}" for step in ("resize", "rescale", "normalize"))
    if not (mean and std and kind and sides and all(processor.get(step, True) for step in steps)):
        return None
    return {
        "size": list(sides),
        "crop_pct": 1.0 if squashed or not short else min(sides) / short,
        "crop_mode": "squash" if squashed else "center",
        "interpolation": kind,
        "mean": mean,
        "std": std,
    }


def _sides(said: Any) -> tuple[int, int] | None:
    """Return height and width, where both are said, alike or not."""
    both = (said.get("height"), said.get("width")) if isinstance(said, Mapping) else (said, said)
    height, width = both
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def layout(
    name: str,
    defaults: Defaults,
    *,
    recognises: Callable[[State], bool],
    rename: Callable[[State, str], dict[str, Tensor]],
    spare: tuple[tuple[str, str], ...],
    options: Callable[[str, State, str], Options] = TIMM.options,
) -> Layout:
    """Make the layout of a kind of model."""
    return dataclasses.replace(
        TIMM,
        name=f"Hugging Face's {name}",
        modules=("vision_transformer", "deit"),
        recognises=recognises,
        rename=rename,
        spare=spare,
        options=options,
        extras=(),
        untold="the activation, the epsilon of the norms or the number of heads",
        said=said(defaults),
        preprocessing=preprocessing,
    )
