"""Weights that are not trained: seeded for trials, hashed for the record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def seed_weights(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter from a seed, each away from the value it is initialised with.

    An initial value can hide an error (a LayerScale of 1e-5 hides a whole block), so scales are
    drawn around 1, biases around 0, and matrices keep the variance of their input. The statistics
    of batch norms are drawn as well.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            kind = name.rstrip("0123456789")  # PVT numbers its positions
            if parameter.ndim >= 2 and not kind.endswith(("_token", "pos_embed", "latent")):
                values *= parameter[0].numel() ** -0.5
            elif parameter.ndim == 1 and (
                name.endswith(("weight", "gamma")) or ".coefficient" in name
            ):
                values = 1 + 0.2 * values
            else:
                values *= 0.2
            parameter.copy_(values)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.2 * torch.rand(buffer.shape, generator=generator))
    return model


def weights_sha256(model: nn.Module, extras: Mapping[str, Tensor] | None = None) -> str:
    """Return the SHA-256 of a model's weights: names, types, shapes and bytes, in name order.

    Args:
        model: the model.
        extras: weights of a method's own, which count as well.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted({**model.state_dict(), **(extras or {})}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
