"""A small ViT that learns scikit-learn's digits on the spot, to some 96 % in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tomexport.exporter.zoo import timm

ARCH = "test_vit"
SIZE = 128  # pixels; a patch of 16 × 16 is a pixel of a digit
N_HELD_OUT = 500
_RESIZED = 134  # before the centre is cropped, by timm's crop_pct of 0.95
_BATCH, _RATE = 32, 3e-3


def images() -> dict[str, dict[str, NDArray[Any]]]:
    """Return the digits, 0 … 255 in three equal channels.

    Returns:
        Of "train" (1,297) and "held_out" (500): images (N, 8, 8, 3) uint8, labels (N).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = (data.images * 15.9375).round().astype(np.uint8)  # from 0 … 16
    pixels = np.repeat(grey[..., None], 3, axis=3)
    order = np.random.default_rng(0).permutation(len(pixels))
    chosen = {"train": order[N_HELD_OUT:], "held_out": order[:N_HELD_OUT]}
    return {k: {"images": pixels[i], "labels": data.target[i]} for k, i in chosen.items()}


def untrained() -> nn.Module:
    """Return timm's smallest ViT for the digits: 65 tokens, 10 classes."""
    model: nn.Module = timm().create_model(ARCH, img_size=SIZE, num_classes=10, weight_init="jax")
    return model


def trained(epochs: int, progress: Callable[[str], None] = lambda message: None) -> nn.Module:
    """Train the model on the digits in "train", from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = untrained()
        nn.init.normal_(model.pos_embed, std=0.5)  # places that differ are learned from sooner
        _train(model.train(), epochs, progress)
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """Return the share of the digits held out that a model is right about."""
    held_out = images()["held_out"]
    with torch.no_grad():
        right = model(_pixels(held_out["images"])).argmax(dim=1).numpy() == held_out["labels"]
    return float(right.mean())


def _pixels(digits: NDArray[Any]) -> Tensor:
    """Resize, crop the centre, into [−1, 1], as the model's preprocessing does."""
    grey = torch.from_numpy(digits[:, None, :, :, 0].astype(np.float32))
    large = functional.interpolate(grey, size=_RESIZED, mode="bicubic", antialias=True)
    inner = slice((_RESIZED - SIZE) // 2, (_RESIZED + SIZE) // 2)
    return (large.clamp(0, 255)[..., inner, inner] / 127.5 - 1).expand(-1, 3, -1, -1)


def _train(model: Any, epochs: int, progress: Callable[[str], None]) -> None:
    digits, labels = images()["train"].values()
    n_steps = len(digits) // _BATCH
    first = list(model.patch_embed.parameters())  # its 768 inputs are nearly one: small steps
    rest = [p for name, p in model.named_parameters() if not name.startswith("patch_embed")]
    optimizer = torch.optim.AdamW([{"params": first}, {"params": rest}], weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [_RATE / 16, _RATE], total_steps=epochs * n_steps, pct_start=0.25
    )
    random = np.random.default_rng(0)
    for epoch in range(epochs):
        total = 0.0
        for chosen in np.split(random.permutation(len(digits))[: n_steps * _BATCH], n_steps):
            logits = model(_pixels(digits[chosen]))
            loss = functional.cross_entropy(logits, torch.from_numpy(labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            total += loss.item()
        progress(f"epoch {epoch + 1} of {epochs}, loss {total / n_steps:.3f}")
