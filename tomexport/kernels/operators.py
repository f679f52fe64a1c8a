"""Operators: called in PyTorch they compute, during export they become one node with a body.

Usage:
    x, size, target = MERGE(x, size, metric, r=8, n_prefix=1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import build_function
from torch import Tensor

from tomexport.artifact import DOMAIN
from tomexport.kernels.merge import function as merge_function
from tomexport.kernels.merge import reference as merge_reference
from tomexport.kernels.merge.cases import cases as merge_cases

_FLOAT, _INT64 = ir.DataType.FLOAT.value, ir.DataType.INT64.value


@dataclass(frozen=True)
class Operator:
    """A reduction of tokens in all its forms: (x, size, signal) → (x, size, target).

    Attributes:
        name: op type of its node, in the domain of tomexport.
        reference: the torch form.
        margin: how far the nearest other decision is, (B,), from the signal alone.
        function: traces the standard-ONNX form with an onnxscript builder.
        cases: inputs that every form is tested and timed with.
        tolerance: largest difference between two forms in float32, relative to the largest value:
            sums of up to a few hundred tokens in another order.
    """

    name: str
    reference: Callable[..., tuple[Tensor, Tensor, Tensor]]
    margin: Callable[..., Tensor]
    function: Callable[..., tuple[ir.Value, ir.Value, ir.Value]]
    cases: Callable[[], list[Any]]
    tolerance: float = 1e-6

    def __call__(
        self, x: Tensor, size: Tensor, signal: Tensor, *, r: int, n_prefix: int,
        raster: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Remove r tokens: run the reference, or emit the node if the model is being exported."""
        if not torch.onnx.is_in_onnx_export():
            return self.reference(x, size, signal, r=r, n_prefix=n_prefix, raster=raster)
        n_batch, n, n_channels = x.shape
        # only where it is asked for: other nodes stay as they were without it
        attributes: dict[str, Any] = {"r": r, "n_prefix": n_prefix}
        attributes |= {"raster": 1} if raster else {}
        merged, merged_size, target = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{self.name}",
            (x, size, signal),
            attributes,
            dtypes=(_FLOAT, _FLOAT, _INT64),
            shapes=((n_batch, n - r, n_channels), (n_batch, n - r, 1), (n_batch, n)),
            version=1,
        )
        return merged, merged_size, target

    def body(self, n: int, r: int, n_prefix: int, opset: int, raster: bool = False) -> ir.Function:
        """Return the node's function for sites of n tokens, all sizes baked in."""
        attributes = ("r", "n_prefix", "raster") if raster else ("r", "n_prefix")
        function: ir.Function = build_function(
            lambda op, *inputs: self.function(
                op, *inputs, n=n, r=r, n_prefix=n_prefix, raster=raster
            ),
            [ir.Value(name=name) for name in ("x", "size", "signal")],
            domain=DOMAIN,
            name=self.name,
            # declared, because the node carries them for the kernels; the body does not read them
            attributes=[ir.Attr(name, ir.AttributeType.INT, None) for name in attributes],
            opset_imports={"": opset},
        )
        function.overload = f"n{n}_r{r}_p{n_prefix}{'_raster' if raster else ''}"
        for index, node in enumerate(function):
            node.name = f"{DOMAIN}/{node.op_type}_{index}"  # how a profile tells them apart
        return function


MERGE = Operator(
    name="Merge",
    reference=merge_reference.merge,
    margin=merge_reference.margin,
    function=merge_function.merge,
    cases=merge_cases,
)

OPERATORS = (MERGE,)
