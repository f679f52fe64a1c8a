"""int8 in ONNX Runtime, by its own tool: products with weights, as QDQ.

Our nodes stay as they are, with their functions: calibration runs those, and fused kernels take
over when the file is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tomexport import scratch
from tomexport.artifact import DOMAIN, Array, Metadata
from tomexport.calib import choosing
from tomexport.calib.choosing import Node
from tomexport.calib.quantizers import smoothing
from tomexport.calib.quantizers.calibration import Calibration
from tomexport.errors import ExportError, need, plain
from tomexport.quiet import quiet
from tomexport.runtime.load import load
from tomexport.runtime.machine import needs_7_bits

# What measured best on a trained ViT-Tiny. Products with weights, by channel; their results stay
# float. The second of an MLP stays float as a whole: of what GELU gives, few channels are so large
# that the rest have few values (cosine of logits 0.994 without it, 0.945 with it).
SETTINGS = {
    "calibrate": "mean of each batch's minimum and maximum", "smooth_quant": smoothing.STRENGTH,
    "weights": "int8 by channel", "activations": "uint8", "float": "products that narrow",
}  # fmt: skip


def asked(source: Path, metadata: Metadata) -> tuple[int, ...]:
    """Return which products choices of a file read, as `choosing.asked` does."""
    model = need("onnx", "onnxruntime").load(source)
    return choosing.asked(tuple(_nodes(model, metadata)), _outputs(model), metadata)


def quantize(
    source: Path, staged: Path, calibration: Calibration, asked: Sequence[int],
    text: Callable[[int], dict[str, str]],
) -> None:  # fmt: skip
    """Write the int8 form of an .onnx file.

    Args:
        source: .onnx that tomexport wrote.
        staged: the .onnx to write.
        calibration: what to calibrate on.
        asked: which products stay float, because choices read them.
        text: what to write into metadata_props, given how many nodes stay float.

    Raises: MissingExtraError without ONNX Runtime, ExportError if it fails.
    """
    onnx = need("onnx", "onnxruntime")
    tool = need("onnxruntime.quantization", "onnxruntime")
    model = onnx.load(source)
    scope = choosing.kept(_nodes(model, calibration.metadata), _outputs(model), asked)
    products = _products(model, set(scope))
    names = [node.name for node in products]
    _smooth(model, products, source, calibration)
    with scratch.folder(staged) as folder:
        made = folder / "int8.onnx"
        try:
            with quiet():
                tool.quantize_static(
                    model,
                    made,
                    _Reader(model.graph.input[0].name, calibration),
                    quant_format=tool.QuantFormat.QDQ,
                    op_types_to_quantize=["MatMul"],
                    nodes_to_quantize=names,
                    per_channel=True,
                    activation_type=tool.QuantType.QUInt8,
                    weight_type=tool.QuantType.QInt8,
                    reduce_range=needs_7_bits(),
                    calibrate_method=tool.CalibrationMethod.MinMax,
                    extra_options={
                        "WeightSymmetric": True,
                        "OpTypesToExcludeOutputQuantization": ["MatMul"],
                        "CalibMovingAverage": True,
                    },
                )
        except Exception as err:
            raise ExportError(f"ONNX Runtime could not quantize {source}: {plain(err)}.") from err
        quantized = onnx.load(made)
    _leave_float(quantized, set(names))
    del quantized.metadata_props[:]
    entries = {f"{DOMAIN}.{key}": value for key, value in text(len(scope)).items()}
    onnx.helper.set_model_props(quantized, entries)
    onnx.save(quantized, staged)
    with staged.open("rb") as file:
        os.fsync(file.fileno())


def _products(model: Any, scope: set[str]) -> list[Any]:
    """Return the products with weights that become int8."""
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type == "MatMul"
        and node.name not in scope
        and len(shape := weights.get(node.input[1], ())) == 2
        and shape[0] <= shape[1]
    ]


def _smooth(model: Any, products: list[Any], source: Path, calibration: Calibration) -> None:
    """Level the channels of what products read, by the largest that the images give."""
    found = list(smoothing.groups(model, products))
    values = tuple(value for group in found for value in group.values)
    runner = load(source, "onnxruntime", extra_outputs=values)
    largest: dict[str, Array] = {}
    for batch in calibration:
        for value, given in zip(values, runner.outputs(batch)[1:], strict=True):
            channels = np.abs(given).reshape(-1, given.shape[-1]).max(axis=0)
            largest[value] = np.maximum(largest.get(value, 0), channels)
    for group in found:
        smoothing.smooth(model, group, np.max([largest[v] for v in group.values], axis=0))


def _nodes(model: Any, metadata: Metadata) -> Iterator[Node]:
    decisions = set(metadata.decisions)
    weights = {tensor.name for tensor in model.graph.initializer}
    maker = {value: node.name for node in model.graph.node for value in node.output}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    for node in model.graph.node:
        inputs = tuple(
            (maker.get(value, ""), value not in weights and _is_tokens(shapes.get(value, ())))
            for value in node.input
        )
        ours = "node" if node.domain == DOMAIN else "body" if DOMAIN in node.name else ""
        decides = next((value for value in node.output if value in decisions), "")
        product = node.op_type in ("MatMul", "Gemm", "Conv") and node.input[1] in weights
        sums = node.op_type == "Add" and all(is_tokens for _, is_tokens in inputs)
        yield Node(node.name, inputs, ours, decides, product, sums)


def _is_tokens(shape: Any) -> bool:
    return len(shape) == 3 and shape[2].dim_value > 1


def _outputs(model: Any) -> list[str]:
    results = {value.name for value in model.graph.output}
    return [node.name for node in model.graph.node if results & set(node.output)]


def _leave_float(model: Any, products: set[str]) -> None:
    """Let all but int8 products read what was there before: the tool turns every reader to int8."""
    maker = {value: node for node in model.graph.node for value in node.output}
    for node in model.graph.node:
        if node.name in products:
            continue
        for i, value in enumerate(node.input):
            back = maker.get(value)
            if back is None or back.op_type != "DequantizeLinear":
                continue
            forth = maker.get(back.input[0])
            if forth is not None and forth.op_type == "QuantizeLinear":
                node.input[i] = forth.input[0]


class _Reader:
    """Batches as ONNX Runtime's tool reads them: one after the other."""

    def __init__(self, name: str, calibration: Calibration) -> None:
        self._batches = ({name: batch} for batch in calibration)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)
