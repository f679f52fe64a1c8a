"""int8 in OpenVINO, by NNCF: transformer settings, our own nodes and what only chooses left float.

Source: https://github.com/openvinotoolkit/nncf, post-training quantization; SmoothQuant is Xiao et
al., 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tomexport.artifact import DOMAIN, Metadata
from tomexport.calib.choosing import Node, choosing
from tomexport.calib.quantizers.calibration import Calibration
from tomexport.errors import ExportError, need, plain
from tomexport.pipeline import require_kernels
from tomexport.quiet import quiet
from tomexport.runtime import fused, openvino_graph
from tomexport.runtime.openvino_backend import OpenVino

# what measured best on a trained ViT-Tiny and on DeiT-Tiny
SETTINGS = {"preset": "mixed", "smooth_quant": 0.95, "fast_bias_correction": True}


def quantize(
    source: Path, staged: Path, calibration: Calibration, text: Callable[[int], dict[str, str]]
) -> None:
    """Write the int8 form of a file as IR.

    Args:
        source: .onnx or .xml that tomexport wrote.
        staged: the .xml to write.
        calibration: what to calibrate on.
        text: what to write into rt_info, given how many nodes stay float.

    Raises: MissingExtraError without NNCF, ExportError if it fails.
    """
    backend = OpenVino()
    if fused.has_own_nodes(source):
        require_kernels(staged)
    model = backend.read(source)
    openvino_graph.fold(model)
    with quiet():
        nncf = need("nncf", "quantize")
    scope = choosing(_nodes(model, calibration.metadata), _outputs(model))
    left = (*scope, *_attention(model))
    try:
        with quiet():
            quantized = nncf.quantize(
                model,
                nncf.Dataset(range(len(calibration)), calibration.__getitem__),
                preset=nncf.QuantizationPreset(SETTINGS["preset"]),
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(calibration),
                fast_bias_correction=SETTINGS["fast_bias_correction"],
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=list(left), validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(
                        matmul=SETTINGS["smooth_quant"]
                    )
                ),
            )
    except Exception as err:
        raise ExportError(f"NNCF could not quantize {source}: {plain(err)}.") from err
    backend.write(quantized, staged, half=calibration.metadata.half, text=text(len(scope)))


def _attention(model: Any) -> Iterator[str]:
    """Name the products of two activations.

    OpenVINO 2026.4 computes them wrongly in int8 where the rest is float32: with 148 tokens, the
    cosine to the right logits is near 0. In bfloat16 it does not, and they gain nothing.
    """
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and not any(map(_is_weight, node.input_values())):
            yield node.get_friendly_name()


def _is_weight(value: Any) -> bool:
    node = value.get_node()
    if node.get_type_name() == "Convert":  # of a weight that is stored as float16
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _nodes(model: Any, metadata: Metadata) -> Iterator[Node]:
    decisions = set(metadata.decisions)
    for node in model.get_ops():
        if node.get_type_name() in ("Constant", "Parameter"):
            continue
        name = node.get_friendly_name()
        own = node.get_type_info().version_id == DOMAIN
        inputs = tuple(
            (value.get_node().get_friendly_name(), _is_tokens(value))
            for value in node.input_values()
        )
        gives = {name for output in node.outputs() for name in output.get_names()}
        ours = "node" if own else "body" if DOMAIN in name else ""
        yield Node(name, inputs, ours, bool(gives & decisions))


def _is_tokens(value: Any) -> bool:
    shape = value.get_partial_shape()
    if shape.rank.get_length() != 3 or value.get_node().get_type_name() == "Constant":
        return False
    return bool(shape[2].is_dynamic or shape[2].get_length() > 1)


def _outputs(model: Any) -> list[str]:
    return [result.get_friendly_name() for result in model.get_results()]
