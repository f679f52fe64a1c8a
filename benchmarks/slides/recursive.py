"""A recursive ViT: 4 blocks of DeiT-Tiny, each called 3 times, as SReT calls each of its twice."""

from __future__ import annotations

from typing import Any

from torch import nn

from tomexport.exporter.zoo import timm

ORIGINAL = "deit_tiny_distilled_patch16_224"
NAME = "deit_tiny_distilled_4x3"


def recursive(model: Any, n_blocks: int, visits: int) -> Any:
    """Let a timm ViT call its first blocks several times each, and drop the others.

    Args:
        model: of timm's class VisionTransformer; it is changed.
        n_blocks: how many blocks stay. Each is one object, its weights stored once.
        visits: how often each is called, in a row.
    """
    kept = list(model.blocks)[:n_blocks]
    model.blocks = nn.Sequential(*(block for block in kept for _ in range(visits)))
    model.pretrained_cfg = {}  # it is no longer what timm's name says
    return model.eval()


def deit_tiny_distilled_4x3(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build 4 blocks × 3 visits: the MACs of DeiT-Tiny-distilled with 40 % of its weights.

    Raises: ValueError for pretrained weights; nobody has trained it.
    """
    if pretrained:
        raise ValueError(f"{NAME} has no trained weights; build it with pretrained=False.")
    return recursive(timm().create_model(ORIGINAL, **options), n_blocks=4, visits=3)


timm().models.register_model(deit_tiny_distilled_4x3)  # so that it is built as any other
