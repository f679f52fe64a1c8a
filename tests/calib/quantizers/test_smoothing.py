"""Channels are levelled without changing what a graph computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tomexport.calib.quantizers.smoothing import groups, smooth

RANDOM = np.random.default_rng(0)


def _graph(nodes, weights):
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 5, 4]) for name in ("x", "y")
    ]
    tensors = [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _node(kind, inputs, output):
    return helper.make_node(kind, inputs, [output], output)


def _run(model):
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.linspace(-1, 2, 20, dtype=np.float32).reshape(1, 5, 4) ** 2
    return session.run(None, {"x": x})[0]


def _weight(*shape):
    return RANDOM.normal(size=shape)


def _block(extra=()):
    nodes = [
        _node("LayerNormalization", ["x", "g", "b"], "n"),
        _node("MatMul", ["n", "w1"], "h"),
        _node("Relu", ["h"], "a"),
        _node("MatMul", ["a", "w2"], "y"),
        *extra,
    ]
    weights = {"g": _weight(4), "b": _weight(4), "w1": _weight(4, 6), "w2": _weight(6, 4)}
    return nodes, weights


def _products(model):
    return [node for node in model.graph.node if node.op_type == "MatMul"]


def test_what_a_norm_gives_is_levelled():
    model = _graph(*_block())
    before = _run(model)
    (found,) = groups(model, _products(model))
    assert (found.norm, found.weights, found.values) == (("g", "b"), ("w1",), ("n",))
    smooth(model, found, np.array([1, 9, 0.1, 4]))
    assert _run(model) == pytest.approx(before, abs=1e-5)


def test_channels_are_level_afterwards():
    nodes, weights = _block()
    model = _graph(nodes, weights)
    group = next(groups(model, _products(model)))
    largest = np.array([100, 1, 1, 0.01])
    smooth(model, group, largest)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    scale = weights["g"] / tensors["g"]
    rows = np.abs(tensors["w1"]).max(axis=1)
    assert largest / scale == pytest.approx(rows)  # as hard for one as for the other
    assert tensors["b"] == pytest.approx(weights["b"] / scale)


def test_a_norm_that_others_read_stays():
    nodes, weights = _block()
    nodes[3] = _node("MatMul", ["a", "w2"], "z")
    model = _graph([*nodes, _node("Add", ["z", "n"], "y")], weights)
    assert list(groups(model, _products(model))) == []


def test_what_is_called_twice_changes_once():
    nodes, weights = _block()
    nodes[3] = _node("MatMul", ["a", "w2"], "z")
    again = [
        _node("LayerNormalization", ["z", "g", "b"], "n2"), _node("MatMul", ["n2", "w1"], "h2"),
        _node("Relu", ["h2"], "a2"), _node("MatMul", ["a2", "w2"], "y"),
    ]  # fmt: skip
    model = _graph([*nodes, *again], weights)
    before = _run(model)
    (found,) = groups(model, _products(model))
    assert found.values == ("n", "n2")
    smooth(model, found, RANDOM.random(4))
    assert _run(model) == pytest.approx(before, abs=1e-5)


def test_a_weight_with_another_use_stays():
    nodes, weights = _block()
    nodes[3] = _node("MatMul", ["a", "w2"], "z")
    more = [_node("MatMul", ["x", "w1"], "u"), _node("MatMul", ["u", "w2"], "v"),
            _node("Add", ["z", "v"], "y")]  # fmt: skip
    model = _graph([*nodes, *more], weights)
    assert list(groups(model, _products(model))) == []
