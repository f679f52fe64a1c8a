"""PyTorch on CUDA, eagerly, for machines where ONNX Runtime has no CUDA provider."""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from torch import nn

import tomexport
from benchmarks.latency import files
from benchmarks.latency.cases import BOUND, FUSED, NAIVE, TIMM, Group, Variant
from tomexport.artifact import Array
from tomexport.errors import BackendError


class TorchWorker:
    """A module on a device that takes turns as a process of `timing` does."""

    precision = "f32"
    kernels = False

    def __init__(self, model: nn.Module, images: torch.Tensor, device: str) -> None:
        self._model = copy.deepcopy(model).to(device)
        self._images = images.to(device)
        self._on_cuda = device == "cuda"

    def time(self, seconds: float) -> list[float]:
        """Return the milliseconds of calls that took so long together; of one call at least."""
        self._run()
        times: list[float] = []
        end = time.monotonic() + seconds
        while not times or time.monotonic() < end:
            start = time.perf_counter()
            self._run()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def output(self) -> Array:
        """Return what it computes of its images: (batch, classes)."""
        result: Array = self._run().cpu().numpy().astype(np.float32)
        return result

    def peak_memory(self) -> None:
        """Return nothing: all modules share one process."""

    def call_memory(self) -> None:
        """Return nothing, for the same reason."""

    def _run(self) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = self._model(self._images)
        if self._on_cuda:
            torch.cuda.synchronize()
        return result


def torch_worker(group: Group, variant: Variant, device: str = "cuda") -> TorchWorker:
    """Return a worker for a variant: timm's module, a peer, or a reduced module.

    Raises: BackendError for fused kernels.
    """
    if variant.form == FUSED:
        raise BackendError("fused kernels are CPU code")
    model = files.module(group.model.name)
    images = files.images(model, group.batch)
    if variant.form in (TIMM, NAIVE):
        return TorchWorker(files.peer(model, variant.form, variant.schedule), images, device)
    method = BOUND if variant.form == BOUND else "tome"
    return TorchWorker(tomexport.reduce(model, variant.schedule, method=method), images, device)
