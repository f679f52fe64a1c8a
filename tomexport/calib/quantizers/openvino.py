"""int8 in OpenVINO, by NNCF: transformer settings, our own nodes and what only chooses left float.

Source: https://github.com/openvinotoolkit/nncf, post-training quantization; SmoothQuant is Xiao et
al., 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tomexport.artifact import DOMAIN, Metadata
from tomexport.calib import choosing
from tomexport.calib.choosing import Node
from tomexport.calib.quantizers.calibration import Calibration
from tomexport.errors import ExportError, need, plain
from tomexport.pipeline import require_kernels
from tomexport.quiet import quiet
from tomexport.runtime import fused, openvino_graph
from tomexport.runtime.openvino_backend import OpenVino

# what measured best on a trained ViT-Tiny and on DeiT-Tiny
SETTINGS: dict[str, Any] = {
    "preset": "performance", "smooth_quant": 0.75, "fast_bias_correction": True, "ranges": "MINMAX",
    "float": "image embedding, products that narrow, attention",
}  # fmt: skip


def asked(source: Path, metadata: Metadata) -> tuple[int, ...]:
    """Return which products choices of a file read, as `choosing.asked` does."""
    model = _model(source)
    return choosing.asked(tuple(_nodes(model, metadata)), _outputs(model), metadata)


def quantize(
    source: Path, staged: Path, calibration: Calibration, asked: Sequence[int],
    text: Callable[[int], dict[str, str]],
) -> None:  # fmt: skip
    """Write the int8 form of a file as IR.

    Args:
        source: .onnx or .xml that tomexport wrote.
        staged: the .xml to write.
        calibration: what to calibrate on.
        asked: which products stay float, because choices read them.
        text: what to write into rt_info, given how many nodes stay float.

    Raises: MissingExtraError without NNCF, ExportError if it fails.
    """
    model = _model(source)
    with quiet():
        nncf = need("nncf", "quantize")
    scope = choosing.kept(_nodes(model, calibration.metadata), _outputs(model), asked)
    left = (*scope, *_attention(model), *_embedding(model), *_narrowing(model))
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
                    activations_range_estimator_params=_ranges(SETTINGS["ranges"]),
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(
                        matmul=SETTINGS["smooth_quant"]
                    ),
                ),
            )
    except Exception as err:
        raise ExportError(f"NNCF could not quantize {source}: {plain(err)}.") from err
    OpenVino().write(quantized, staged, half=calibration.metadata.half, text=text(len(scope)))


def _model(source: Path) -> Any:
    if fused.has_own_nodes(source):
        require_kernels(source.with_suffix(".xml"))
    model = OpenVino().read(source)
    openvino_graph.fold(model)
    return model


def _attention(model: Any) -> Iterator[str]:
    """Name the products of two activations.

    OpenVINO 2026.4 computes them wrongly in int8 where the rest is float32: with 148 tokens, the
    cosine to the right logits is near 0. In bfloat16 it does not, and they gain nothing.
    """
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and not _is_product(node):
            yield node.get_friendly_name()


def _embedding(model: Any) -> Iterator[str]:
    """Name the convolutions that read the image.

    All tokens come from there, for 3 % of the products of a ViT-Tiny. ONNX Runtime's tool leaves
    convolutions float as well.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Convolution":
            source = node.input_value(0).get_node()
            if source.get_type_name() == "Parameter":
                yield node.get_friendly_name()


def _narrowing(model: Any) -> Iterator[str]:
    """Name the products that give fewer channels than they read: the second of each MLP.

    Of what GELU gives, few channels, and in the middle of a trained ViT few tokens ("massive
    activations", Sun et al., 2024, arXiv:2402.17762), are so large that the rest have few values.
    """
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and _is_product(node):
            read, given = node.input_value(0).get_partial_shape(), node.get_output_partial_shape(0)
            if read[len(read) - 1].get_length() > given[len(given) - 1].get_length():
                yield node.get_friendly_name()


def _ranges(name: str) -> Any:
    """Return NNCF's way to find what values activations take, by its name."""
    with quiet():
        module = need("nncf.quantization.range_estimator", "quantize")
    return getattr(module.RangeEstimatorParametersSet, name)


def _is_product(node: Any) -> bool:
    """Whether a node multiplies by weights."""
    kinds = ("MatMul", "Convolution", "GroupConvolution")
    return node.get_type_name() in kinds and any(map(_is_weight, node.input_values()))


def _is_weight(value: Any) -> bool:
    node = value.get_node()
    if node.get_type_name() == "Convert":  # of a weight that is stored as float16
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _nodes(model: Any, metadata: Metadata) -> Iterator[Node]:
    decisions = set(metadata.decisions)
    for node in model.get_ordered_ops():
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
        decides = next(iter(gives & decisions), "")
        sums = node.get_type_name() == "Add" and all(is_tokens for _, is_tokens in inputs)
        yield Node(name, inputs, ours, decides, _is_product(node), sums)


def _is_tokens(value: Any) -> bool:
    shape = value.get_partial_shape()
    if shape.rank.get_length() != 3 or value.get_node().get_type_name() == "Constant":
        return False
    return bool(shape[2].is_dynamic or shape[2].get_length() > 1)


def _outputs(model: Any) -> list[str]:
    return [result.get_friendly_name() for result in model.get_results()]
