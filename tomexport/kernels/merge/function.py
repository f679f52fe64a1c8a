"""Merge in standard ONNX: static shapes, no TopK, no scatter, no shape arithmetic.

TopK is avoided because OpenVINO does not keep its ties in order. Instead every token of A counts
the tokens ahead of it: `ahead[i, j]` = v_j > v_i, or v_j = v_i and j < i. That is one comparison of
the difference v_j − v_i with a constant: with zero, or where j < i with a number just below zero.
Nothing depends on how finely floats resolve, so it holds in bfloat16 too; counts and slots are
integers, which every runtime leaves as they are.

The order of operations is measured, in ONNX Runtime and OpenVINO on a CPU; a comment says so where
it is not the obvious one.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import onnx_ir as ir

from tomexport.kernels.merge.reference import parities
from tomexport.kernels.raster import in_raster_order_onnx

_BELOW_ZERO = -1e-37  # nearer to zero than two cosines come that differ, and not denormal


def merge(
    op: Any, x: ir.Value, size: ir.Value, signal: ir.Value, *, n: int, r: int, n_prefix: int,
    raster: bool = False,
) -> tuple[ir.Value, ir.Value, ir.Value]:  # fmt: skip
    """Trace the body for one site of n tokens. Shapes as in the package's docstring."""
    if r == 0:
        return _identity(op, x, size, n)
    target = _match(op, signal, n, r, n_prefix)
    if raster:
        target = in_raster_order_onnx(op, target, n, n - r)
    # (B, M, N): 1 where the token of the column goes to the slot of the row
    one_hot = op.OneHot(target, [n - r], [0.0, 1.0], axis=1)
    merged_size = op.MatMul(one_hot, size)  # (B, M, 1)
    # the share of each token in its slot, (B, N, 1): dividing sizes is less work than dividing x
    share = op.Div(size, op.GatherElements(merged_size, op.Unsqueeze(target, [2]), axis=1))
    return op.MatMul(one_hot, op.Mul(x, share)), merged_size, target


def _identity(op: Any, x: ir.Value, size: ir.Value, n: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    zeros = op.ArgMax(op.Slice(x, [0], [1], [2]), axis=2)  # (B, N, 1), whatever x holds
    sizes = op.Add(size, op.Cast(zeros, to=ir.DataType.FLOAT))  # one size serves all images
    return op.Identity(x), sizes, op.Add(op.Squeeze(zeros, [2]), _constant(op, np.arange(n)))


def _match(op: Any, signal: ir.Value, n: int, r: int, n_prefix: int) -> ir.Value:
    """Return the slot of each token, (B, N)."""
    first_a, first_b = parities(n_prefix)
    n_a, n_b = len(range(first_a, n, 2)), len(range(first_b, n, 2))
    index = np.arange(n_a)
    first_b_slot = n_prefix + n_a - r

    best, partner = _best(op, signal, n, first_a, first_b)
    rank = _rank(op, best, n_a)
    source = op.Cast(op.Less(rank, _constant(op, [r], np.int32)), to=ir.DataType.INT64)

    # slot in A = source ? first_b_slot + partner : kept, as kept + source · (… − kept)
    if n_prefix:  # kept = n_prefix + i − (sources up to i)
        before = op.CumSum(source, 1)
        base = n_prefix + index
        to_b = op.Add(op.Add(partner, before), _constant(op, first_b_slot - base))
        slot = op.Sub(op.Mul(source, to_b), before)
    else:  # kept = rank − r
        rank = op.Cast(rank, to=ir.DataType.INT64)
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


def _best(
    op: Any, signal: ir.Value, n: int, first_a: int, first_b: int
) -> tuple[ir.Value, ir.Value]:
    """Return the best score of each token of A, (B, 1, 1, |A|), and whose it is in B, (B, |A|)."""
    # four axes throughout: with three, OpenVINO reorders what it computes in bfloat16
    metric = op.ReduceMean(signal, [1], keepdims=1)  # (B, 1, N, D)
    direction = op.Div(metric, op.ReduceL2(metric, [-1], keepdims=1))
    set_a = op.Slice(direction, [first_a], [n], [2], [2])
    set_b = op.Slice(direction, [first_b], [n], [2], [2])
    # (B, 1, |B|, |A|), B down: OpenVINO finds the maxima of columns faster than those of rows
    scores = op.MatMul(set_b, op.Transpose(set_a, perm=[0, 1, 3, 2]))
    partner = op.ArgMax(scores, axis=2, keepdims=1)
    return op.GatherElements(scores, partner, axis=2), op.Squeeze(partner, [1, 2])


def _rank(op: Any, best: ir.Value, n_a: int) -> ir.Value:
    """Return how many tokens of A are ahead of each, (B, |A|), int32."""
    index = np.arange(n_a)
    column, row = _constant(op, index[None, :], np.int32), _constant(op, index[:, None], np.int32)
    # computed once, when the file is loaded: in the file it would be as large as |A|²
    threshold = op.Mul(op.Cast(op.Less(column, row), to=ir.DataType.FLOAT), [_BELOW_ZERO])
    difference = op.Sub(best, op.Transpose(best, perm=[0, 1, 3, 2]))
    ahead = op.Greater(difference, threshold)  # (B, 1, |A|, |A|)
    # int32: ONNX Runtime sums it faster than int64
    return cast(ir.Value, op.ReduceSum(op.Cast(ahead, to=ir.DataType.INT32), [1, 3], keepdims=0))


def _constant(op: Any, values: Any, dtype: type = np.int64) -> ir.Value:
    return cast(ir.Value, op.Constant(value=ir.tensor(np.asarray(values, dtype))))
