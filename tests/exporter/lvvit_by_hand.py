"""LV-ViT written a second time from its description, one image at a time, over a state dict.

Shares no code with the package: convolutions and attention are written out in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional


def forward(
    state: Mapping[str, Tensor],
    image: Tensor,
    n_heads: int,
    before: Callable[[int, Tensor], Tensor] = lambda index, x: x,
) -> Tensor:
    """Run one image (3, H, W).

    Args:
        state: the weights, under their published names.
        image: the image.
        n_heads: of each block.
        before: (block, tokens (N, C)) → the tokens that the block is given.

    Returns:
        (classes,) float64.
    """
    w = {key: tensor.double() for key, tensor in state.items() if tensor.is_floating_point()}
    x = image.double()
    for index, (stride, padding) in enumerate([(2, 3), (1, 1), (1, 1)], start=1):
        x = functional.conv2d(
            x[None], w[f"patch_embed.conv{index}.weight"], stride=stride, padding=padding
        )[0]
        bn = f"patch_embed.bn{index}."
        mean, var = w[f"{bn}running_mean"], w[f"{bn}running_var"]
        factor = w[f"{bn}weight"] / (var + 1e-5).sqrt()
        x = (x - mean[:, None, None]) * factor[:, None, None] + w[f"{bn}bias"][:, None, None]
        x = x.clamp(min=0)
    kernel = w["patch_embed.proj.weight"]
    patches = functional.unfold(x[None], 8, stride=8)[0].T  # (N, 64 · 64)
    x = patches @ kernel.flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"][0], x]) + w["pos_embed"][0]
    n_blocks = len({key.split(".")[1] for key in w if key.startswith("blocks.")})
    for index in range(n_blocks):
        x = before(index, x)
        at = f"blocks.{index}."
        h = _norm(x, w, f"{at}norm1")
        qkv = (h @ w[f"{at}attn.qkv.weight"].T).chunk(3, dim=1)
        heads = []
        for q, k, v in zip(*(each.chunk(n_heads, dim=1) for each in qkv), strict=True):
            scores = (q @ k.T / q.shape[1] ** 0.5).exp()
            heads.append(scores / scores.sum(1, keepdim=True) @ v)
        x = x + _linear(torch.cat(heads, 1), w, f"{at}attn.proj") / 2
        h = _linear(_norm(x, w, f"{at}norm2"), w, f"{at}mlp.fc1")
        h = h * (1 + torch.erf(h / 2**0.5)) / 2
        x = x + _linear(h, w, f"{at}mlp.fc2") / 2
    x = _norm(x, w, "norm")
    return _linear(x[0], w, "head") + _linear(x[1:], w, "aux_head").max(0).values / 2


def _linear(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]
