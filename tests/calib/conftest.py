"""A ViT that has learned scikit-learn's digits, trained once for all tests of calib."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tomexport
from tomexport.exporter.zoo import timm

SCHEDULE = "const:8"
SIZE = 128  # pixels; a patch of 16 × 16 is a pixel of a digit


@dataclass(frozen=True)
class Digits:
    """A trained model, its files, and digits that it has not seen.

    Attributes:
        model: timm's test_vit at 128 × 128 pixels, 65 tokens, 10 classes; do not change it.
        checkpoint: its weights, which `tomexport export` takes as they are.
        train: .npz of 1,297 digits that it was trained on: `images` (N, 8, 8, 3), `labels`.
        held_out: .npz of the 500 others.
        accuracy: top-1 on those.
    """

    model: nn.Module
    checkpoint: Path
    train: Path
    held_out: Path
    accuracy: float


def _pixels(digits: np.ndarray) -> torch.Tensor:
    """Prepare digits as the model's preprocessing does: resize to 134, crop 128, in [−1, 1]."""
    grey = torch.from_numpy(digits[:, None, :, :, 0].astype(np.float32))
    large = functional.interpolate(grey, size=134, mode="bicubic", antialias=True).clamp(0, 255)
    return large[..., 3:131, 3:131] / 127.5 - 1  # (N, 1, 128, 128)


def _learn(model: nn.Module, digits: np.ndarray, classes: np.ndarray) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.init_weights("jax")
        nn.init.normal_(model.pos_embed, std=0.5)  # places that differ are learned from sooner
        _train(model.train(), _pixels(digits), torch.from_numpy(classes), epochs=5)


def _train(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    rate, size = 3e-3, 32
    n_steps = len(pixels) // size
    first = list(model.patch_embed.parameters())  # its 768 inputs are nearly one: small steps
    rest = [p for name, p in model.named_parameters() if not name.startswith("patch_embed")]
    optimizer = torch.optim.AdamW([{"params": first}, {"params": rest}], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate / 16, rate], total_steps=epochs * n_steps, pct_start=0.25
    )
    random = np.random.default_rng(0)
    for _ in range(epochs):
        for chosen in np.split(random.permutation(len(pixels))[: n_steps * size], n_steps):
            logits = model(pixels[chosen].expand(-1, 3, -1, -1))
            loss = functional.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all processes of one test run share."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    (folder / "digits").mkdir(exist_ok=True)
    return folder / "digits"


@pytest.fixture(scope="session")
def digits(shared_folder) -> Digits:
    """Train the model in seconds, once for all processes, to about 94 % on unseen digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = (data.images * 15.9375).round().astype(np.uint8)  # 0 … 16 → 0 … 255
    pixels = np.repeat(grey[..., None], 3, axis=3)
    order = np.random.default_rng(0).permutation(len(pixels))
    parts = {"train": order[500:], "held_out": order[:500]}
    model = timm().create_model("test_vit", img_size=SIZE, num_classes=10, weight_init="jax")
    weights = shared_folder / "digits.pth"
    with (shared_folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not weights.exists():
            for name, chosen in parts.items():
                np.savez(
                    shared_folder / f"{name}.npz", images=pixels[chosen], labels=data.target[chosen]
                )
            _learn(model, pixels[parts["train"]], data.target[parts["train"]])
            torch.save(model.state_dict(), weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    held_out = parts["held_out"]
    with torch.no_grad():
        found = model.eval()(_pixels(pixels[held_out]).expand(-1, 3, -1, -1)).argmax(dim=1)
    right = found.numpy() == data.target[held_out]
    return Digits(
        model, weights, shared_folder / "train.npz", shared_folder / "held_out.npz",
        float(right.mean()),
    )  # fmt: skip


@pytest.fixture(scope="session")
def merged(digits, tmp_path_factory) -> Path:
    """The model with 48 of its 65 tokens merged away, as .onnx, with its baselines beside it."""
    path = tmp_path_factory.mktemp("merged") / "merged.onnx"
    tomexport.export(
        digits.checkpoint, SCHEDULE, path, arch="test_vit", batch=None, verify=False,
        with_baselines=True,
    )  # fmt: skip
    return path
