"""Plain vision transformers: timm's modules `vision_transformer`, `deit` and `…_hybrid`.

Sources: Dosovitskiy et al., ICLR 2021; Touvron et al., ICML 2021 (DeiT) and ECCV 2022 (DeiT III);
implementation: timm's vision_transformer.py and deit.py. Hybrids have a convolutional network for
a patch embedding. Blocks that norm what a branch gives are those of Liu et al., CVPR 2022.
"""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from tomexport.exporter.families import transformer
from tomexport.exporter.families.transformer import Stem
from tomexport.exporter.zoo import timm
from tomexport.plan import ModelCost


def accepts(model: nn.Module) -> bool:
    """Whether a model is one of timm's plain vision transformers, whatever its blocks."""
    timm()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    return type(model) in (VisionTransformer, VisionTransformerDistilled)


def refusal_beside_blocks(model: Any) -> str | None:
    """Return why a plain vision transformer cannot be reduced, apart from its blocks."""
    from timm.layers import HybridEmbed, PatchEmbed

    known = (PatchEmbed, HybridEmbed)
    return transformer.refusal_of_patches(model, known) or transformer.refusal_of_pooling(model)


def _refusal(model: Any) -> str | None:
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, ResPostBlock

    blocks = transformer.refusal_of_blocks(model, (Block, ResPostBlock), (Attention,))
    return blocks or refusal_beside_blocks(model)


def stem(model: Any) -> Stem:
    """Return what the patch embedding costs."""
    if not hasattr(model.patch_embed, "backbone"):
        return transformer.conv_stem(model)
    macs, normalised = _counted(model.patch_embed, (model.in_chans, *model.patch_embed.img_size))
    return Stem(model.patch_embed.num_patches, macs, normalised)


def _counted(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return products and normalised elements of a network, by a run without numbers."""
    tensors = chain(network.parameters(), network.buffers())
    network = copy.deepcopy(network, {id(tensor): tensor.to("meta") for tensor in tensors}).eval()
    macs = normalised = 0

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal macs, normalised
        del inputs
        if isinstance(module, nn.Conv2d):
            macs += output.numel() * math.prod(module.weight.shape[1:])
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            normalised += output.numel()

    for module in network.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.empty(1, *input_shape, device="meta"))
    return macs, normalised


def _cost(model: Any, name: str) -> ModelCost:
    return transformer.cost(model, name, stem(model))


def embed(model: Any, image: Tensor) -> Tensor:
    """Compute the tokens (B, N, C) that the blocks are given."""
    x = model._pos_embed(model.patch_embed(image))
    return cast(Tensor, model.norm_pre(x))


VIT = transformer.family(
    "vit",
    modules=("vision_transformer", "deit", "vision_transformer_hybrid"),
    accepts=accepts,
    refusal=_refusal,
    cost=_cost,
    embed=embed,
)
