"""Operators: called in PyTorch they compute, during export they become one node with a body.

Usage:
    x, size, target = MERGE(x, size, keys, r=8, n_prefix=1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from tomexport.kernels.rank import function as rank_function
from tomexport.kernels.rank import reference as rank_reference
from tomexport.kernels.rank.cases import cases as rank_cases
from tomexport.kernels.reduce import function as reduce_function
from tomexport.kernels.reduce import reference as reduce_reference
from tomexport.kernels.reduce.cases import cases as reduce_cases

_FLOAT, _INT64 = ir.DataType.FLOAT.value, ir.DataType.INT64.value


@dataclass(frozen=True)
class Operator:
    """A part of token reduction in all its forms.

    What an operator takes first is of N tokens, (B, N, …). One that reduces takes x (B, N, C) and
    removes r tokens: it gives x (B, N − r, C) and the sizes (B, N − r, 1), and "target", the slot
    of each token, is among what it takes or gives. All else that is given is a whole number for
    each token, (B, N).

    Attributes:
        name: op type of its node, in the domain of tomexport.
        inputs: names of its inputs, "x" first if it reduces.
        outputs: names of its outputs: "x" and "size" if it reduces, "target" if it decides then.
        attributes: its integer attributes, "r" among them if it reduces.
        optional: those that nodes can leave out, and what they are then.
        reference: the torch form.
        function: traces the standard-ONNX form with an onnxscript builder; is told n and the
            attributes.
        cases: inputs that every form is tested and timed with.
        tolerance: largest difference between two forms in float32, relative to the largest value:
            sums of up to a few hundred tokens in another order.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    optional: Mapping[str, int]
    reference: Callable[..., tuple[Tensor, ...]]
    function: Callable[..., tuple[ir.Value, ...]]
    cases: Callable[[], list[Any]]
    tolerance: float = 1e-6

    def __call__(self, *inputs: Tensor, **attributes: int) -> tuple[Tensor, ...]:
        """Run the reference, or emit the node if the model is being exported."""
        if not torch.onnx.is_in_onnx_export():
            return self.reference(*inputs, **attributes)
        n_batch, n, *n_channels = inputs[0].shape
        left = (n_batch, n - attributes.get("r", 0))
        kinds = {"x": (_FLOAT, (*left, *n_channels)), "size": (_FLOAT, (*left, 1))}
        given = [kinds.get(name, (_INT64, (n_batch, n))) for name in self.outputs]
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{self.name}",
            inputs,
            # what is as it would be without stays out, so that nodes are as they were before it
            {k: int(v) for k, v in attributes.items() if self.optional.get(k) != v},
            dtypes=[dtype for dtype, _ in given],
            shapes=[shape for _, shape in given],
            version=1,
        )
        return tuple(outputs)

    def decision(self, node: ir.Node) -> ir.Value | None:
        """Return the value of a node that says which slot each token goes to, if it reduces."""
        if "target" in self.outputs:
            return node.outputs[self.outputs.index("target")]
        return node.inputs[self.inputs.index("target")] if "target" in self.inputs else None

    def body(self, n: int, opset: int, given: Mapping[str, int]) -> ir.Function:
        """Return the function of a node for n tokens, all sizes baked in.

        Args:
            n: tokens in.
            opset: ONNX opset.
            given: the attributes that the node has.
        """
        attributes = {**self.optional, **given}
        function: ir.Function = build_function(
            lambda op, *inputs: self.function(op, *inputs, n=n, **attributes),
            [ir.Value(name=name) for name in self.inputs],
            domain=DOMAIN,
            name=self.name,
            # declared, because the node carries them for the kernels; the body does not read them
            attributes=[ir.Attr(name, ir.AttributeType.INT, None) for name in given],
            opset_imports={"": opset},
        )
        said = [f"{name}{value}" for name, value in given.items()]
        function.overload = "_".join([f"n{n}", *said])
        for index, node in enumerate(function):
            node.name = f"{DOMAIN}/{node.op_type}_{index}"  # how a profile tells them apart
        return function


MERGE = Operator(
    name="Merge",
    inputs=("x", "size", "signal"),
    outputs=("x", "size", "target"),
    attributes=("r", "n_prefix", "raster"),
    optional={"raster": 0},
    reference=merge_reference.merge,
    function=merge_function.merge,
    cases=merge_cases,
)

REDUCE = Operator(
    name="Reduce",
    inputs=("x", "mass", "target", "weight"),
    outputs=("x", "size"),
    attributes=("r", "mean", "fixed"),
    optional={"fixed": 0},
    reference=reduce_reference.reduce,
    function=reduce_function.reduce,
    cases=reduce_cases,
)

RANK = Operator(
    name="Rank",
    inputs=("score",),
    outputs=("rank", "order"),
    attributes=(),
    optional={},
    reference=rank_reference.rank,
    function=rank_function.rank,
    cases=rank_cases,
)

OPERATORS = (MERGE, REDUCE, RANK)
