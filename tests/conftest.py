"""Models and images that many tests share. Weights are seeded; no test needs the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOMEXPORT_KERNELS"] = "off"  # a test that wants fused kernels takes the fixture `fused`

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn

from tomexport.exporter.weights import seed_weights
from tomexport.exporter.zoo import timm
from tomexport.kernels import build

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@lru_cache(maxsize=4)
def _seeded(name: str, seed: int, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    return seed_weights(timm().create_model(name, **dict(options)), seed).eval()


@pytest.fixture(scope="session")
def seeded() -> Callable[..., nn.Module]:
    """Build a timm model with every parameter drawn from a seed. Do not change what it returns."""

    def build(name: str = "test_vit", seed: int = 0, **options: Any) -> nn.Module:
        return _seeded(name, seed, tuple(sorted(options.items())))

    return build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "compiler" in getattr(item, "fixturenames", ()):
            item.add_marker("native")


@pytest.fixture(scope="session")
def lacking() -> Callable[..., NoReturn]:
    """Skip a test for what is not here, with the command that brings it. CI must have it."""

    def skip(what: str, command: str, required: str = "TOMEXPORT_REQUIRE_NATIVE") -> NoReturn:
        why = f"without {what}; to run this test: {command}"
        if os.environ.get(required):
            pytest.fail(why)
        pytest.skip(why)

    return skip


@pytest.fixture(scope="session")
def compiler(lacking) -> str:
    """The C++ compiler of this machine, which has CMake as well."""
    tools = build.tools()
    if None in tools.values():
        lacking("a C++ compiler and CMake", "apt install g++ cmake")
    return str(tools["c++"])


@pytest.fixture(scope="session")
def kernel_cache(compiler, tmp_path_factory) -> Path:
    """A cache of kernels that all processes of one test run share."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    return folder / "kernel-cache"


@pytest.fixture
def fused(kernel_cache, monkeypatch) -> Path:
    """Let sessions use fused kernels, which are built when the first one does."""
    monkeypatch.delenv("TOMEXPORT_KERNELS")
    monkeypatch.setenv("TOMEXPORT_CACHE", str(kernel_cache))
    return kernel_cache


@pytest.fixture(scope="session")
def natural_images() -> Callable[[int], np.ndarray]:
    """Photographs that scikit-image and scikit-learn ship: (4, 3, size, size) in [−1, 1]."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    photographs = [data.astronaut(), data.chelsea(), *load_sample_images().images]

    def load(size: int) -> np.ndarray:
        resized = [np.asarray(Image.fromarray(p).resize((size, size))) for p in photographs]
        return np.stack(resized).astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1

    return load
