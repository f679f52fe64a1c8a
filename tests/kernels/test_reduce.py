"""Reduce: every form against sums written by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from onnx import inliner

from tomexport.artifact import DOMAIN
from tomexport.kernels.operators import REDUCE
from tomexport.kernels.reduce.cases import Case, cases

OPSET = 18
each_case = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


def slow(case: Case, x, mass, target, weight):
    """Token by token, in float64."""
    shape = (case.batch, case.n - case.r)
    total, size = np.zeros((*shape, case.channels)), np.zeros((*shape, 1))
    weights = np.zeros((*shape, 1))
    for image in range(case.batch):
        for token in range(case.n):
            slot = target[image, token]
            if slot < 0:
                continue
            total[image, slot] += x[image, token].astype(float) * float(weight[image, token, 0])
            weights[image, slot] += weight[image, token]
            size[image, slot] += mass[image, token]
    return total / weights if case.mean else total, size


def model(case: Case) -> bytes:
    """A model of one node with its body, expanded."""
    body = REDUCE.body(case.n, OPSET, case.attributes)
    sizes = {"x": case.channels, "mass": 1, "weight": 1}
    inputs = []
    for name in REDUCE.inputs:
        last = (sizes[name],) if name in sizes else ()
        kind = ir.DataType.FLOAT if name in sizes else ir.DataType.INT64
        shape = ir.Shape((case.batch, case.n, *last))
        inputs.append(ir.Value(name=name, type=ir.TensorType(kind), shape=shape))
    outputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("left", "size")
    ]
    attributes = [ir.AttrInt64(name, value) for name, value in case.attributes.items()]
    node = ir.Node(DOMAIN, "Reduce", inputs, attributes, overload=body.overload, outputs=outputs)
    graph = ir.Graph(
        inputs, outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="one_node"
    )
    whole = ir.to_proto(ir.Model(graph, ir_version=10, functions=[body]))
    return inliner.inline_local_functions(onnx.load_from_string(whole.SerializeToString()))\
        .SerializeToString()  # fmt: skip


def check(case: Case, found) -> None:
    arrays = [tensor.numpy() for tensor in case.inputs()]
    total, size = slow(case, *arrays)
    largest = REDUCE.tolerance * max(1.0, np.abs(total).max())
    np.testing.assert_allclose(found[0], total, rtol=0, atol=largest)
    np.testing.assert_array_equal(found[1], size)


@each_case
def test_reference(case: Case) -> None:
    check(case, [t.numpy() for t in REDUCE.reference(*case.inputs(), **case.attributes)])


@each_case
def test_function_in_onnxruntime(case: Case) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model(case), options, providers=["CPUExecutionProvider"])
    feed = dict(zip(REDUCE.inputs, (t.numpy() for t in case.inputs()), strict=True))
    check(case, session.run(None, feed))


@each_case
def test_function_in_openvino(case: Case) -> None:
    core = ov.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model(case)), "CPU", hint)
    found = compiled([t.numpy() for t in case.inputs()])
    check(case, [found[output] for output in compiled.outputs])


def test_tokens_that_go_nowhere_are_in_no_slot() -> None:
    x = torch.tensor([[[1.0], [10.0], [100.0]]])
    target = torch.tensor([[0, -1, 0]])
    ones = torch.ones(1, 3, 1)
    left, size = REDUCE(x, ones, target, ones, r=2, mean=0)
    assert (left.item(), size.item()) == (101.0, 2.0)
