"""Slots in raster order: each stands where the first of its tokens stood. In torch and in ONNX.

What reads tokens by their place, like attention inside slices, needs them so after a reduction.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Int
from torch import Tensor


def in_raster_order(target: Int[Tensor, "B N"], n_slots: int) -> Int[Tensor, "B N"]:
    """Number the slots anew, by the first token of each.

    Args:
        target: slot of each token; every slot has one.
        n_slots: how many there are.
    """
    n_batch, n = target.shape
    tokens = torch.arange(n, device=target.device).expand(n_batch, n)
    first = target.new_full((n_batch, n_slots), n)
    first.scatter_reduce_(1, target, tokens, "amin")  # (B, M)
    return first.argsort(dim=1).argsort(dim=1).gather(1, target)


def in_raster_order_onnx(op: Any, target: ir.Value, n: int, n_slots: int) -> ir.Value:
    """Trace the same for n tokens, in integers throughout, which no runtime rounds."""
    from_end = _constant(op, np.arange(n, 0, -1))  # token t is the (n − t)-th from the end
    one_hot = op.OneHot(target, [n_slots], [0, 1], axis=1)  # (B, M, N)
    # nothing elementwise may follow at once: OpenVINO 2026.4 fuses it, and loses images of a batch
    first = op.ReduceMax(op.Mul(one_hot, from_end), [2], keepdims=0)  # (B, M)
    leader = op.GatherElements(first, target, axis=1)  # (B, N): the first token of its slot
    leads = op.Cast(op.Equal(leader, from_end), to=ir.DataType.INT64)
    number = op.Sub(op.CumSum(leads, 1), _constant(op, [1]))  # of the leaders, in their order
    place = op.Sub(_constant(op, [n]), leader)
    return cast(ir.Value, op.GatherElements(number, place, axis=1))


def _constant(op: Any, values: Any) -> ir.Value:
    return cast(ir.Value, op.Constant(value=ir.tensor(np.asarray(values, np.int64))))
