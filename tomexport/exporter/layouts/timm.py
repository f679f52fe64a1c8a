"""timm's own layout, which DeiT, AugReg and most published ViT checkpoints share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tomexport.exporter.layouts.layout import Layout


def _recognises(state: Mapping[str, Tensor]) -> bool:
    return all(any(key.startswith(part) for key in state) for part in ("patch_embed.", "blocks."))


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(state)


TIMM = Layout(
    name="timm",
    recognises=_recognises,
    rename=_rename,
    spare=(
        (r"mask_token", "used in pre-training only"),
        (r"decoder_.*|decoder\..*", "the decoder of pre-training"),
        (r"(.*\.)?total_(ops|params)", "left by a FLOP counter"),
        (r"n_averaged", "the count of an averaged model"),
        (r"score_predictor\..*", "predictors of DynamicViT or TPS"),
        (r"blocks\.\d+\.attn\.out_zero_mask", "zero mask of ATS"),
    ),
)
