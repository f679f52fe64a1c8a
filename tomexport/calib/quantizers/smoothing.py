"""SmoothQuant for an ONNX graph (Xiao et al., 2023, arXiv:2211.10438), where it costs nothing.

A LayerNorm gives some channels that are much larger than the rest, and one step for all of them
leaves the rest few values. Dividing a channel by s in the LayerNorm's weight and offset, and
multiplying the rows of the products that read it by s, changes no result, and levels the channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tomexport.artifact import Array
from tomexport.errors import need

STRENGTH = 0.5  # the paper's α: how much of the difficulty goes to the weights


@dataclass(frozen=True)
class Group:
    """LayerNorms of one weight, and the products that read them: all that must change together.

    Attributes:
        norm: names of the LayerNorms' weight and offset.
        weights: names of the products' weights.
        values: names of what the LayerNorms give.
    """

    norm: tuple[str, ...]
    weights: tuple[str, ...]
    values: tuple[str, ...]


def groups(model: Any, products: Sequence[Any]) -> Iterator[Group]:
    """Find the LayerNorms that nothing but products reads, where no weight has another use.

    Args:
        model: an onnx.ModelProto.
        products: its MatMuls that will be int8; weights come second.
    """
    readers = defaultdict(list)
    for node in model.graph.node:
        for value in node.input:
            readers[value].append(node.name)
    chosen = {node.name: node for node in products}
    norms = defaultdict(list)
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            norms[tuple(node.input[1:])].append(node)
    for norm, nodes in norms.items():
        values = tuple(node.output[0] for node in nodes)
        names = [name for value in values for name in readers[value]]
        weights = tuple(dict.fromkeys(chosen[name].input[1] for name in names if name in chosen))
        own = {*names, *(node.name for node in nodes)}
        alone = all(own.issuperset(readers[each]) for each in (*norm, *weights))
        if weights and alone and all(name in chosen for name in names):
            yield Group(norm, weights, values)


def smooth(model: Any, group: Group, largest: Array) -> None:
    """Level the channels of a group.

    Args:
        model: an onnx.ModelProto; its weights are changed.
        group: of `groups`.
        largest: (C,) the largest magnitude of each channel among its values.
    """
    helper = need("onnx.numpy_helper", "onnxruntime")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [helper.to_array(tensors[name]) for name in group.weights]
    rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    scale = np.maximum(largest, 1e-5) ** STRENGTH / np.maximum(rows, 1e-5) ** (1 - STRENGTH)
    scale = scale.astype(np.float32)
    for name, weight in zip(group.weights, weights, strict=True):
        tensors[name].CopyFrom(helper.from_array(weight * scale[:, None], name))
    for name in group.norm:
        tensors[name].CopyFrom(helper.from_array(helper.to_array(tensors[name]) / scale, name))
