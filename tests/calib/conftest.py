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

import tomexport
from benchmarks.study import digits as study

SCHEDULE = "const:8"


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
    model, weights = study.untrained(), shared_folder / "digits.pth"
    with (shared_folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not weights.exists():
            for name, arrays in study.images().items():
                np.savez(shared_folder / f"{name}.npz", **arrays)
            torch.save(study.trained(epochs=5).state_dict(), weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return Digits(
        model, weights, shared_folder / "train.npz", shared_folder / "held_out.npz",
        study.accuracy(model.eval()),
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
