"""Reduce in standard ONNX: one product with a one-hot matrix, static shapes, no scatter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def reduce(
    op: Any, x: ir.Value, mass: ir.Value, target: ir.Value, weight: ir.Value,
    *, n: int, r: int, mean: int, fixed: int,
) -> tuple[ir.Value, ir.Value]:  # fmt: skip
    """Trace the body for one site of n tokens. Shapes as in the package's docstring."""
    del fixed
    slots = op.Constant(value=ir.tensor(np.arange(n - r, dtype=np.int64)[:, None]))
    # (B, M, N): 1 where the token of the column goes to the slot of the row. Not OneHot: there −1
    # is the last slot
    goes = op.Equal(op.Unsqueeze(target, [1]), slots)
    one_hot = op.Cast(goes, to=ir.DataType.FLOAT)
    size = op.MatMul(one_hot, mass)  # (B, M, 1)
    total = op.MatMul(one_hot, op.Mul(x, weight))
    if mean:
        total = op.Div(total, op.MatMul(one_hot, weight))
    return total, size
