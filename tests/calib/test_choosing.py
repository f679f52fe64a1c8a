"""What only chooses tokens is found: the products that are left are those of the unmerged model."""

from __future__ import annotations

import functools

import onnx
import pytest

import tomexport
from tomexport.calib.choosing import Node, choosing, kept
from tomexport.calib.quantizers import onnx as of_onnx
from tomexport.calib.quantizers import openvino as of_openvino
from tomexport.runtime.openvino_backend import OpenVino


def _node(name, *inputs, ours="", decides="", tokens=(), product=False):
    return Node(name, tuple((i, i in tokens) for i in inputs), ours, decides, product)


def test_what_leads_only_to_a_choice():
    nodes = [
        _node("stem", "image"),
        _node("keys", "stem"),
        _node("attention", "keys", "stem"),
        _node("embedding", "keys"),
        _node("similarity", "embedding"),
        _node("merge", "attention", "", "similarity", ours="node", decides="target"),
        _node("head", "merge"),
    ]
    assert choosing(nodes, ["head"]) == ("embedding", "similarity", "merge")


def test_an_inlined_body():
    nodes = [
        _node("stem", "image"),
        _node("attention", "stem"),
        _node("predictor", "stem"),
        _node("score", "predictor", decides="target"),
        _node("weight", "predictor"),
        _node("body/one-hot", "score", ours="body"),
        _node("body/scaled", "attention", "weight", ours="body", tokens=("attention",)),
        _node("body/product", "body/one-hot", "body/scaled", ours="body"),
        _node("head", "body/product"),
    ]
    assert set(choosing(nodes, ["head"])) == {
        "predictor", "score", "weight", "body/one-hot", "body/scaled", "body/product",
    }  # fmt: skip


@pytest.fixture(scope="module")
def export(seeded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("choosing")

    @functools.cache
    def make(schedule, method, ops):
        path = folder / f"{method}-{schedule}-{ops}.onnx".replace(":", "-")
        return tomexport.export("test_vit", schedule, path, method=method, ops=ops,
                                random_weights=0, verify=False).metadata, path  # fmt: skip

    return make


def _products_of_onnx(path, metadata):
    model = onnx.load(path)
    kept = set(of_onnx._nodes(model, metadata) and choosing(
        of_onnx._nodes(model, metadata), of_onnx._outputs(model)
    ))  # fmt: skip
    products = [n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    return sum(name not in kept for name in products), len(products)


def _products_of_openvino(path, metadata):
    model = OpenVino().read(path)
    kept = set(choosing(of_openvino._nodes(model, metadata), of_openvino._outputs(model)))
    kinds = ("MatMul", "Convolution")
    products = [n.get_friendly_name() for n in model.get_ops() if n.get_type_name() in kinds]
    return sum(name not in kept for name in products), len(products)


@pytest.fixture(scope="module")
def unmerged(export):
    metadata, path = export("none", "tome", "custom")
    of_all = _products_of_onnx(path, metadata), _products_of_openvino(path, metadata)
    assert all(left == total for left, total in of_all)
    return of_all


_QKV = {1: 1 + 4 * 1, 3: 1 + 4 * 3}  # after the embedding, four products a block


@pytest.mark.parametrize(
    ("method", "schedule", "blocks"),
    [
        ("tome", "list:0,40,0,40,0,0", (1, 3)),
        ("tome", "list:0,8,0,40,0,0", (3,)),
        ("tome:metric=x-after", "list:0,40,0,40,0,0", ()),
        ("evit", "list:0,40,0,40,0,0", (1, 3)),
        ("dtem", "list:0,40,0,40,0,0", ()),  # its embedding is its own
        ("dtps", "keep:0.7@2,4", ()),
    ],
)
@pytest.mark.parametrize("ops", ["custom", "portable"])
def test_what_choices_that_remove_many_tokens_read(export, method, schedule, blocks, ops):
    metadata, path = export(schedule, method, ops)
    wanted = tuple(_QKV[block] for block in blocks)
    assert of_onnx.asked(path, metadata) == wanted
    if ops == "portable":
        assert of_openvino.asked(path, metadata) == wanted
        model = OpenVino().read(path)
        named = kept(of_openvino._nodes(model, metadata), of_openvino._outputs(model), wanted)
        shapes = {
            tuple(node.get_output_partial_shape(0))[-1].get_length()
            for node in model.get_ops()
            if node.get_friendly_name() in named[-len(wanted) :] and wanted
        }
        assert shapes <= {3 * 64}


@pytest.mark.parametrize(
    ("method", "ops"),
    [
        ("tome", "custom"), ("tome", "portable"), ("tome:metric=x-after", "portable"),
        ("evit", "portable"), ("dtem", "custom"), ("dtps", "custom"), ("dtps", "portable"),
    ],
)  # fmt: skip
def test_as_many_products_are_left_as_the_unmerged_model_has(export, unmerged, method, ops):
    schedule = "keep:0.7@2,4" if method == "dtps" else "list:0,8,0,8,0,0"
    metadata, path = export(schedule, method, ops)
    left, total = _products_of_onnx(path, metadata)
    assert left == unmerged[0][0]
    assert (total > left) == ((method, ops) != ("tome", "custom"))
    if ops == "portable":
        assert _products_of_openvino(path, metadata)[0] == unmerged[1][0]
