"""Reduced module → ONNX graph: traced by PyTorch, with the operators' bodies attached."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset18 as op18
from onnxscript.optimizer import fold_constants

from tomexport.artifact import DOMAIN
from tomexport.errors import ExportError, pick, plain
from tomexport.exporter.rewrite import ReducedModel
from tomexport.kernels.operators import OPERATORS
from tomexport.plan import Plan
from tomexport.quiet import quiet

INPUT_NAME = "image"
_ANY_SIZE = 2**40
_FOLDED_APART = 2**16  # elements; PyTorch folds weights below that once for each use
_GELU_OPSET = 20  # the first with an operator for it
_ROOT_2, _ROOT_2_OVER_PI = math.sqrt(2), math.sqrt(2 / math.pi)
_IR_VERSION = 10  # the first with overloads, which give each site a body of its own


def to_onnx(
    model: ReducedModel, *, batch: int | None, opset: int, portable: bool, trace: bool = False
) -> tuple[ir.Model, tuple[str, ...]]:
    """Export a reduced module.

    Args:
        model: what to export.
        batch: images per call, or None for any number.
        opset: ONNX opset, 18 or newer.
        portable: standard operators only, instead of nodes of our domain with function bodies.
        trace: give out the target maps as well, after the model's own output.

    Returns:
        The graph, and the names of the target maps inside it, one per reduction.

    Raises: ExportError if PyTorch cannot trace or convert the model, or if there is no map to give.
    """
    graph_model = _trace(model.folded(), batch, opset)
    decisions = _attach_bodies(graph_model, opset)
    if trace:
        _give_out(graph_model, decisions, model.plan)
    if portable:
        passes.InlinePass()(graph_model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph_model)
        graph_model.opset_imports.pop(DOMAIN, None)
    passes.RemoveUnusedNodesPass()(graph_model)
    passes.DeduplicateInitializersPass(_FOLDED_APART)(graph_model)
    passes.ShapeInferencePass()(graph_model)
    _widen_biases(graph_model.graph)
    graph_model.ir_version = _IR_VERSION
    graph_model.producer_name = DOMAIN
    _require_static(graph_model, batch)
    return graph_model, decisions


def _gelu(x: Any, approximate: str = "none") -> Any:
    """GELU as ½·(x·(1 + erf(x/√2))): in this order, both runtimes fuse it into one operation."""
    if approximate == "tanh":
        inner = op18.Tanh(_ROOT_2_OVER_PI * (x + 0.044715 * (x * x * x)))
        return 0.5 * (x * (1.0 + inner))
    return 0.5 * (x * (op18.Erf(x / _ROOT_2) + 1.0))


_TRANSLATIONS: dict[Any, Any] = {torch.ops.aten.gelu.default: _gelu}


def _trace(model: ReducedModel, batch: int | None, opset: int) -> ir.Model:
    n_example = 2 if batch is None else batch  # torch.export takes a batch of one for a constant
    example = torch.zeros(n_example, *model.input_shape)
    dynamic = ({0: torch.export.Dim("batch")},) if batch is None else None
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[model.output],
                dynamic_shapes=dynamic,
                external_data=False,
                custom_translation_table=_TRANSLATIONS if opset < _GELU_OPSET else None,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as err:
        raise ExportError(
            f"PyTorch {torch.__version__} could not export this model to ONNX: {plain(err)}. "
            "Run with --debug for its full report."
        ) from err
    if program is None:
        raise ExportError(f"PyTorch {torch.__version__} returned no ONNX program for this model.")
    graph_model = program.model
    with quiet():
        fold_constants(graph_model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    passes.ClearMetadataAndDocStringPass()(graph_model)
    return graph_model


def _attach_bodies(graph_model: ir.Model, opset: int) -> tuple[str, ...]:
    """Give every node of our domain its function, and its target map, if it decides, a name."""
    decisions: list[str] = []
    nodes = [node for node in graph_model.graph if node.domain == DOMAIN]
    for index, node in enumerate(nodes):
        operator = pick("operator", OPERATORS, node.op_type)
        first, target = node.inputs[0], operator.decision(node)
        assert first is not None
        assert first.shape is not None
        n_tokens = first.shape[1]
        assert isinstance(n_tokens, int)
        given = {name: value.as_int() for name, value in node.attributes.items()}
        function = operator.body(n_tokens, opset, given)
        graph_model.functions[function.identifier()] = function
        node.overload = function.overload
        node.name = f"{DOMAIN}/{operator.name}_{index}"
        if target is not None and not given.get("fixed"):
            target.name = f"decision_{len(decisions)}"
            decisions.append(target.name)
    graph_model.opset_imports[DOMAIN] = 1
    return tuple(decisions)


def _widen_biases(graph: ir.Graph) -> None:
    """Give each bias the rank of the product that it is added to.

    Of a product and a bias of one axis ONNX Runtime makes a Gemm between two Reshapes, which is
    slower, and which it does not compute in int8.
    """
    for bias in graph.initializers.values():
        ranks = {_rank_of_product(use.node) for use in bias.uses()}
        rank, tensor = max(ranks, default=0), bias.const_value
        if tensor is not None and len(tensor.shape) == 1 and len(ranks) == 1 and rank > 2:
            values = tensor.numpy().reshape(*[1] * (rank - 1), -1)
            bias.const_value = ir.tensor(values, name=bias.name)
            bias.shape = ir.Shape(values.shape)


def _rank_of_product(node: ir.Node) -> int:
    """Return the rank of the matrix product that a node adds something to; 0 if it does not."""
    if node.op_type != "Add":
        return 0
    makers = ((value, value.producer()) for value in node.inputs if value is not None)
    shapes = (value.shape for value, maker in makers if maker and maker.op_type == "MatMul")
    return max((len(shape) for shape in shapes if shape is not None), default=0)


def _give_out(graph_model: ir.Model, decisions: tuple[str, ...], plan: Plan) -> None:
    if not decisions:
        raise ExportError(
            f"There is no choice of tokens to trace: {plan.method} with {plan.schedule} makes none "
            "that an image could change. Leave --trace out."
        )
    values = {value.name: value for node in graph_model.graph for value in node.outputs}
    values |= {value.name: value for node in graph_model.graph for value in node.inputs if value}
    graph_model.graph.outputs.extend(values[name] for name in decisions)


def _require_static(graph_model: ir.Model, batch: int | None) -> None:
    """Check the promise that every shape is known, but for a dynamic batch.

    Raises: ExportError naming the first value whose shape is not.
    """
    for node in graph_model.graph:
        for value in node.outputs:
            dims = value.shape
            known = dims is not None and all(
                isinstance(dim, int) or (batch is None and i == 0) for i, dim in enumerate(dims)
            )
            if not known and not (batch is None and _is_shape_arithmetic(node)):
                raise ExportError(
                    f"The output {value.name} of {node.op_type} has the shape {dims}, which is not "
                    "known before it runs. This is an error of tomexport; please report the model."
                )


def _is_shape_arithmetic(node: ir.Node) -> bool:
    return node.op_type in ("Shape", "Concat", "Gather", "Squeeze", "Unsqueeze")
