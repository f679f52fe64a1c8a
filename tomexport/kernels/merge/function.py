"""Merge in standard ONNX: static shapes, no TopK, no scatter, no shape arithmetic.

TopK is avoided because OpenVINO does not keep its ties in order. Instead every token of A counts
the tokens ahead of it: `ahead[i, j]` = v_j > v_i, or v_j = v_i and j < i. With the sign of
v_j − v_i in {−1, 0, 1} and i, j scaled to [0, 1/2), that is one comparison:
sign(v_j − v_i) + i·ε > j·ε.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import onnx_ir as ir

from tomexport.kernels.merge.reference import parities


def merge(
    op: Any, x: ir.Value, size: ir.Value, signal: ir.Value, *, n: int, r: int, n_prefix: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Trace the body for one site of n tokens. Shapes as in the package's docstring."""
    if r == 0:
        return _identity(op, x, size, n)
    target = _match(op, signal, n, r, n_prefix)
    # (B, M, N): 1 where the token of the column goes to the slot of the row
    one_hot = op.OneHot(target, [n - r], [0.0, 1.0], axis=1)
    merged_size = op.MatMul(one_hot, size)  # (B, M, 1)
    merged = op.Div(op.MatMul(one_hot, op.Mul(x, size)), merged_size)  # (B, M, C)
    return merged, merged_size, target


def _identity(op: Any, x: ir.Value, size: ir.Value, n: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    zeros = op.ArgMax(op.Slice(x, [0], [1], [2]), axis=2)  # (B, N, 1), whatever x holds
    sizes = op.Add(size, op.Cast(zeros, to=ir.DataType.FLOAT))  # one size serves all images
    return op.Identity(x), sizes, op.Add(op.Squeeze(zeros, [2]), _constant(op, np.arange(n)))


def _match(op: Any, signal: ir.Value, n: int, r: int, n_prefix: int) -> ir.Value:
    first_a, first_b = parities(n_prefix)
    n_a, n_b = len(range(first_a, n, 2)), len(range(first_b, n, 2))
    index = np.arange(n_a)
    first_b_slot = n_prefix + n_a - r

    metric = op.ReduceMean(signal, [1], keepdims=0)  # (B, N, D)
    direction = op.Div(metric, op.ReduceL2(metric, [-1], keepdims=1))
    set_a = op.Slice(direction, [first_a], [n], [1], [2])
    set_b = op.Slice(direction, [first_b], [n], [1], [2])
    scores = op.MatMul(set_a, op.Transpose(set_b, perm=[0, 2, 1]))  # (B, |A|, |B|)
    best = op.ReduceMax(scores, [2], keepdims=1)  # (B, |A|, 1)
    partner = op.ArgMax(scores, axis=2, keepdims=0)  # (B, |A|)

    step = np.float32(0.5 / n_a)
    rows = _constant(op, (index * step)[:, None], np.float32)
    columns = _constant(op, (index * step)[None, :], np.float32)
    sign = op.Sign(op.Sub(op.Transpose(best, perm=[0, 2, 1]), best))
    ahead = op.Cast(op.Greater(op.Add(sign, rows), columns), to=ir.DataType.INT64)
    rank = op.ReduceSum(ahead, [2], keepdims=0)  # (B, |A|)
    source = op.Cast(op.Less(rank, _constant(op, [r])), to=ir.DataType.INT64)

    # slot in A = source ? first_b_slot + partner : kept, as kept + source · (… − kept)
    if n_prefix:  # kept = n_prefix + i − (sources up to i)
        before = op.CumSum(source, 1)
        base = n_prefix + index
        to_b = op.Add(op.Add(partner, before), _constant(op, first_b_slot - base))
        slot = op.Sub(op.Mul(source, to_b), before)
    else:  # kept = rank − r
        base = np.full(n_a, -r)
        to_b = op.Add(op.Sub(partner, rank), _constant(op, [first_b_slot + r]))
        slot = op.Add(op.Mul(source, to_b), rank)

    # prefix, A, B side by side, then back into the order of the tokens
    padded = op.Pad(slot, [0, n_prefix, 0, n_b])
    constant = np.concatenate([np.arange(n_prefix), base, first_b_slot + np.arange(n_b)])
    place = np.empty(n, np.int64)
    place[:n_prefix] = np.arange(n_prefix)
    place[first_a::2] = n_prefix + index
    place[first_b::2] = n_prefix + n_a + np.arange(n_b)
    target = op.Gather(op.Add(padded, _constant(op, constant[None])), _constant(op, place), axis=1)
    return cast(ir.Value, target)


def _constant(op: Any, values: Any, dtype: type = np.int64) -> ir.Value:
    return cast(ir.Value, op.Constant(value=ir.tensor(np.asarray(values, dtype))))
