"""The vision tower of Hugging Face's SigLIP, alone or in a file with its text tower.

Its head is an attention pool, whose packed projection comes apart here. A classifier reads the mean
of all tokens after the last norm, as SiglipForImageClassification does; then the head is unread.
"""

from __future__ import annotations

from torch import Tensor

from tomexport.exporter.layouts.huggingface import (
    TOWER,
    TOWER_SPARE,
    Defaults,
    as_timm,
    has,
    layout,
)
from tomexport.exporter.layouts.layout import State

_PREFIX = r"vision_model\."
_PACKED = "head.attention.in_proj_"
_NAMES = (
    *TOWER,
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj\.(.+)", r"attn_pool.proj.\1"),
    (r"head\.layernorm\.(.+)", r"attn_pool.norm.\1"),
    (r"head\.mlp\.(.+)", r"attn_pool.mlp.\1"),
    (r"classifier\.(.+)", r"head.\1"),
)


def _recognises(state: State) -> bool:
    keys = ("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight")
    others = ("embeddings.class_embedding", "pre_layrnorm.weight")  # CLIP's, and others'
    return all(has(state, _PREFIX, key) for key in keys) and not any(
        has(state, _PREFIX, key) for key in others
    )


def _rename(state: State, source: str) -> dict[str, Tensor]:
    named = as_timm(state, _PREFIX, _NAMES, source)
    if "pos_embed" in named:
        named["pos_embed"] = named["pos_embed"][None]
    for kind in ("weight", "bias"):
        packed = named.pop(f"{_PACKED}{kind}", None)
        if packed is not None and packed.ndim:
            width = packed.shape[0] // 3
            named[f"attn_pool.q.{kind}"], named[f"attn_pool.kv.{kind}"] = (
                packed[:width],
                packed[width:],
            )
    if "classifier.weight" in state:
        named = {f"unread.{k}" if k.startswith("attn_pool.") else k: t for k, t in named.items()}
    return named


HF_SIGLIP = layout(
    "SigLIP",
    Defaults(("siglip", "siglip_vision_model"), activation="gelu_pytorch_tanh", epsilon=1e-6),
    recognises=_recognises,
    rename=_rename,
    spare=(*TOWER_SPARE, (r"unread\..+", "a pool that the classifier does not read")),
)
