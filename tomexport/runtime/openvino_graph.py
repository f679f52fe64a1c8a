"""What an OpenVINO session changes in a graph before it compiles it for fused kernels.

Two things that a file cannot say, because they serve this runtime alone:

- The LayerNorm and the logarithm that follow a reduction become part of its kernel, which has the
  token at hand. The node then has two more inputs, weight and offset, and two more outputs.
- Where OpenVINO computes in bfloat16, it runs nodes of other makers in the types that the graph
  says, which are float32, and converts around them. So our nodes are told to take and to give
  bfloat16; only what they want in float32, like sizes, stays so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tomexport.artifact import DOMAIN
from tomexport.errors import need

_X, _SIZE = range(2)  # the first outputs of ours
_REAL = f"{DOMAIN}.real"  # our nodes mark the inputs that are of the type of x, which comes first


def prepare(model: Any, library: Path, *, bfloat16: bool) -> None:
    """Change a model in place; the names of its tensors stay.

    Args:
        model: an openvino.Model, read with the library.
        library: the fused kernels.
        bfloat16: whether it will be computed in bfloat16.
    """
    if not any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
        fold(model)  # int8 weights would become float32; such a file was folded before
    factory = need("openvino.utils.node_factory", "openvino").NodeFactory()
    factory.add_extension(str(library))
    for node in model.get_ordered_ops():
        if _is_ours(node):
            _fuse_what_follows(node, factory)
    if bfloat16:
        for node in model.get_ordered_ops():
            if _is_ours(node):
                _compute_in_bfloat16(node)
    model.validate_nodes_and_infer_types()


def fold(model: Any) -> None:
    """Compute in place what constants alone decide."""
    passes = need("openvino.passes", "openvino")
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)


def _is_ours(node: Any) -> bool:
    return bool(node.get_type_info().version_id == DOMAIN)


def _readers(value: Any) -> list[Any]:
    return [i.get_node() for i in value.get_target_inputs()]


def _replace(old: Any, new: Any) -> None:
    """Let all that read a value read another, which takes over its names."""
    names, readers = old.get_names(), old.get_target_inputs()
    old.set_names(set())
    new.set_names(new.get_names() | names)
    for reader in readers:
        reader.replace_source_output(new)


# --- what follows


def _fuse_what_follows(node: Any, factory: Any) -> None:
    norms = filter(None, map(_layer_norm, _readers(node.output(_X))))
    if (found := next(norms, None)) is None:
        return
    norm, weight, offset, epsilon = found
    logarithms = [n for n in _readers(node.output(_SIZE)) if n.get_type_name() == "Log"]
    fused = factory.create(
        node.get_type_name(),
        [*node.input_values(), weight, offset],
        {**node.get_attributes(), "epsilon": epsilon},
    )
    fused.set_friendly_name(node.get_friendly_name())
    *outputs, norm_out, log_size_out = fused.outputs()
    for old, new in zip(node.outputs(), outputs, strict=True):
        _replace(old, new)
    _replace(norm, norm_out)
    for logarithm in logarithms:
        _replace(logarithm.output(0), log_size_out)


def _layer_norm(mvn: Any) -> tuple[Any, Any, Any, float] | None:
    """Return output, weight, offset and epsilon of a LayerNorm over channels, or None."""
    if mvn.get_type_name() != "MVN":
        return None
    said = mvn.get_attributes()
    axes = mvn.input_value(1).get_node()
    is_norm = said["normalize_variance"] and said["eps_mode"] == "INSIDE_SQRT"
    if not is_norm or axes.get_type_name() != "Constant" or axes.get_data().tolist() != [-1]:
        return None
    scaled, weight = _with_constant(mvn.output(0), "Multiply")
    shifted, offset = _with_constant(scaled, "Add")
    return None if shifted is None else (shifted, weight, offset, said["eps"])


def _with_constant(value: Any, kind: str) -> tuple[Any, Any]:
    """Return the result of the one node that reads a value, and the vector it reads beside."""
    readers = _readers(value) if value is not None else []
    if [reader.get_type_name() for reader in readers] != [kind]:
        return None, None
    vectors = [v for v in readers[0].input_values() if _is_constant(v) and len(v.get_shape()) == 1]
    return (readers[0].output(0), vectors[0]) if vectors else (None, None)


def _is_constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


# --- bfloat16


def _compute_in_bfloat16(node: Any) -> None:
    types = need("openvino", "openvino").Type
    for reader in node.inputs():
        if _REAL in reader.get_rt_info():
            reader.replace_source_output(_converted(reader.get_source_output(), types.bf16))
    node.validate_and_infer_types()
    for output in node.outputs():
        readers = output.get_target_inputs()
        if readers and output.get_element_type() == types.bf16:
            back = _converted(output, types.f32)
            for reader in readers:
                reader.replace_source_output(back)


def _converted(value: Any, to: Any) -> Any:
    """Convert a value in a way that costs nothing where OpenVINO computes all around in bfloat16.

    A Convert between types that have become one is dropped when the graph is compiled, unless it
    was taken into a compiled subgraph before; with more than six axes it is not. Views are free.
    """
    operators = need("openvino.opset13", "openvino")
    more = list(range(7 - value.get_partial_shape().rank.get_length()))
    seven = operators.convert(operators.unsqueeze(value, more), to)
    return operators.squeeze(seven, more).output(0)
