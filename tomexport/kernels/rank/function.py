"""Rank in standard ONNX: every pair is compared, because TopK keeps no order of ties in OpenVINO.

Comparisons and sums of integers alone, so that every runtime and precision finds a permutation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def rank(op: Any, score: ir.Value, *, n: int) -> tuple[ir.Value, ir.Value]:
    """Trace the body for n tokens. Shapes as in the package's docstring."""
    row = op.Constant(value=ir.tensor(np.arange(n, dtype=np.int32)[None, :]))
    column = op.Constant(value=ir.tensor(np.arange(n, dtype=np.int32)[:, None]))
    number = op.Where(op.IsNaN(score), [-np.inf], score)
    mine, other = op.Unsqueeze(number, [2]), op.Unsqueeze(number, [1])
    # computed once, when the file is loaded: in the file it would be as large as N²
    earlier = op.Less(row, column)
    ahead = op.Or(op.Greater(other, mine), op.And(op.Equal(other, mine), earlier))  # (B, N, N)
    # int32: ONNX Runtime sums it faster than int64
    ranks = op.ReduceSum(op.Cast(ahead, to=ir.DataType.INT32), [2], keepdims=0)
    here = op.Equal(op.Unsqueeze(ranks, [1]), column)  # (B, N, N): the token of the row's rank
    tokens = op.ReduceSum(op.Mul(op.Cast(here, to=ir.DataType.INT32), row), [2], keepdims=0)
    return op.Cast(ranks, to=ir.DataType.INT64), op.Cast(tokens, to=ir.DataType.INT64)
