"""Gathering by index, in the form that each use of it wants."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Take the rows of x (B, N, C) that index (B, M) names, (B, M, C)."""
    if not torch.onnx.is_in_onnx_export():
        return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
    taken: Tensor = torch.onnx.ops.symbolic(  # torch has no name for a gather of whole rows
        "GatherND",
        (x, index[:, :, None]),
        {"batch_dims": 1},
        dtype=x.dtype,
        shape=(x.shape[0], index.shape[1], x.shape[2]),
    )
    return taken


def at_places(x: Tensor, slot: Tensor | None, n: int) -> Tensor:
    """Give each of n places what its slot holds: x (B, M, C) → (B, N, C).

    Args:
        x: what the slots hold.
        slot: (B, N) int32, the slot of each place; None where nobody chose: M slots then serve the
            places evenly, and all of them as they are if there are as many.
        n: how many places there are.
    """
    if slot is not None:
        return rows(x, slot.long())
    return x if x.shape[1] == n else x.index_select(1, torch.arange(n) * x.shape[1] // n)


def entries(values: Tensor, index: Tensor) -> Tensor:
    """Take the entries of values (B, M) that index (B, N) names, (B, N); both int32."""
    if not torch.onnx.is_in_onnx_export():
        return values.gather(1, index.long())
    taken: Tensor = torch.onnx.ops.symbolic(  # torch gathers by int64 alone
        "GatherElements", (values, index), {"axis": 1}, dtype=values.dtype, shape=index.shape
    )
    return taken
