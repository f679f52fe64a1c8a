"""The free-merge bound: what a method's graph would cost if reducing were free.

Every reduction is replaced by one Slice of the tokens, which keeps as many and chooses nothing. The
sizes become a constant, so that the size bias of the attention stays in the graph. What such a
model predicts means nothing; its speed is what the merged model's is measured against.

In bfloat16 OpenVINO 2026.4 does not even predict that: it reads a constant bias that serves all
heads wrongly. A bias for each head is read right and takes as long (0.4 % less), so the speed
stands.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tomexport.exporter.methods.method import Method
from tomexport.exporter.methods.tome import TOME


class _Slice:
    """Keeps the first tokens."""

    def __call__(
        self, x: Tensor, size: Tensor, signal: Tensor, *, r: int, n_prefix: int, raster: bool
    ) -> tuple[Tensor, Tensor, None]:
        """Return the first N − r tokens, each of the same size; nothing is decided."""
        del signal, n_prefix, raster
        n = x.shape[1]
        return x[:, : n - r], x.new_full((1, n - r, 1), n / (n - r)), None

    def margin(self, signal: Tensor, *, r: int, n_prefix: int, raster: bool) -> Tensor:
        """Return infinity: there is no decision that could be another."""
        del r, n_prefix, raster
        return signal.new_full((signal.shape[0],), torch.inf)


def bound_of(method: Method) -> Method:
    """Return the free-merge bound of a method: the same counts at the same places."""
    return dataclasses.replace(method, name="bound", operator=_Slice())


BOUND = bound_of(TOME)
