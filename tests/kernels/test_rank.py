"""Rank: every form against a sort by hand, and what its node carries."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import inliner

from tomexport.artifact import DOMAIN
from tomexport.kernels.operators import RANK
from tomexport.kernels.rank.cases import Case, cases

OPSET = 18
each_case = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


def slow(score):
    """Rank and order of one image's scores."""

    def height(token):
        return -np.inf if np.isnan(score[token]) else float(score[token])

    order = sorted(range(len(score)), key=lambda token: (-height(token), token))
    return np.argsort(order).tolist(), order


def check(case: Case, found) -> None:
    (score,) = case.inputs()
    for image, rank, order in zip(score.numpy(), *found, strict=True):
        expected = slow(image)
        np.testing.assert_array_equal(rank, expected[0])
        np.testing.assert_array_equal(order, expected[1])
    assert {array.dtype for array in found} == {np.dtype(np.int64)}


def model(case: Case) -> bytes:
    """A model of one node with its body, expanded."""
    body = RANK.body(case.n, OPSET, {})
    shape = ir.Shape((case.batch, case.n))
    (score,) = inputs = [ir.Value(name="score", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)]
    outputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=shape)
        for name in RANK.outputs
    ]
    node = ir.Node(DOMAIN, "Rank", [score], overload=body.overload, outputs=outputs)
    graph = ir.Graph(
        inputs, outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="one_node"
    )
    whole = ir.to_proto(ir.Model(graph, ir_version=10, functions=[body]))
    onnx.checker.check_model(whole, full_check=True)
    return inliner.inline_local_functions(onnx.load_from_string(whole.SerializeToString()))\
        .SerializeToString()  # fmt: skip


@each_case
def test_reference(case: Case) -> None:
    check(case, [t.numpy() for t in RANK(*case.inputs())])


@each_case
def test_function_in_onnxruntime(case: Case) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model(case), options, providers=["CPUExecutionProvider"])
    check(case, session.run(None, {"score": case.inputs()[0].numpy()}))


@each_case
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_function_in_openvino(case: Case, precision: str) -> None:
    core = ov.Core()
    hint = {"INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(model(case)), "CPU", hint)
    found = compiled([t.numpy() for t in case.inputs()])
    check(case, [found[output] for output in compiled.outputs])


@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=30))
def test_any_scores_become_a_permutation(scores: list[float]) -> None:
    rank, order = RANK(torch.tensor([scores]))
    assert (rank[0].tolist(), order[0].tolist()) == slow(np.array(scores, np.float32))


def test_ties_go_to_the_lower_index() -> None:
    rank, order = RANK(torch.tensor([[0.5, 1.0, 0.5, 1.0, torch.nan, 0.0, -torch.inf]]))
    assert rank.tolist() == [[2, 0, 3, 1, 5, 4, 6]]
    assert order.tolist() == [[1, 3, 0, 2, 5, 4, 6]]


def test_a_body_is_no_larger_for_more_tokens() -> None:
    small, large = (len(model(Case(n))) for n in (20, 577))
    assert large - small < 577 * 10  # not N²
