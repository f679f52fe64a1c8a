"""What an OpenVINO session changes in a graph: less to run, the same outputs, the types it says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import openvino
import openvino.opset13 as ops
import pytest
from openvino.utils.node_factory import NodeFactory

import tomexport
from tomexport.errors import BackendError
from tomexport.kernels import build
from tomexport.runtime import openvino_graph
from tomexport.runtime.openvino_backend import OpenVino

pytestmark = pytest.mark.openvino
BF16, F32 = openvino.Type.bf16, openvino.Type.f32


@pytest.fixture
def library(fused):
    return build.library("openvino", OpenVino().version())


@pytest.fixture
def read(files, library):
    """Read the small model, with nodes of our own, and perhaps prepare it."""

    def read(**options):
        core = openvino.Core()
        core.add_extension(str(library))
        model = core.read_model(files / "model.onnx")
        if options:
            openvino_graph.prepare(model, library, **options)
        return model

    return read


def kinds(model):
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


def merges(model):
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "Merge"]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_merge_takes_over_what_follows(read, bfloat16):
    before, after = read(), read(bfloat16=bfloat16)
    n = len(merges(before))
    assert n > 1
    assert len(merges(after)) == n
    lost = kinds(before) - kinds(after)
    assert (lost["MVN"], lost["Log"]) == (n, kinds(before)["Log"])
    for old, new in zip(merges(before), merges(after), strict=True):
        assert new.get_friendly_name() == old.get_friendly_name()
        attributes = new.get_attributes()
        assert attributes.pop("epsilon") == pytest.approx(1e-6)
        assert attributes == old.get_attributes()
        names = [[value.get_names() for value in node.outputs()] for node in (old, new)]
        assert names[0][:3] == names[1][:3]


def test_merges_take_and_give_bfloat16_and_nothing_else_does(read):
    model = read(bfloat16=True)
    for node in merges(model):
        types = [value.get_element_type() for value in node.input_values()]
        assert types == [BF16, F32, BF16, F32, F32]
        types = [value.get_element_type() for value in node.outputs()]
        assert types == [BF16, F32, openvino.Type.i32, BF16, BF16]
    kinds_in_it = {n.get_type_name() for n in model.get_ordered_ops() if gives_bfloat16(n)}
    assert kinds_in_it == {"Merge", "Convert", "Squeeze", "Unsqueeze"}


def gives_bfloat16(node):
    return any(value.get_element_type() == BF16 for value in node.outputs())


def test_nothing_is_converted_around_a_merge(read):
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bfloat16")
    compiled = core.compile_model(read(bfloat16=True), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    nodes = compiled.get_runtime_model().get_ordered_ops()
    assert not any("Convert" in said(node, "originalLayersNames") for node in nodes)
    ours = [node for node in nodes if said(node, "layerType") == "Reference"]
    assert len(ours) > 1
    beside = [value.get_node() for node in ours for value in node.input_values()]
    assert "Reorder" not in {said(node, "layerType") for node in beside}


def said(node, what):
    return node.get_rt_info()[what].astype(str)


def test_without_bfloat16_no_type_changes(read):
    nodes = read(bfloat16=False).get_ops()
    assert BF16 not in {value.get_element_type() for node in nodes for value in node.outputs()}


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("schedule", "method"),
    [("const:8", None), ("exp:0.25,0", None), ("keep:0.7@1,3", "evit"), ("const:8", "diffrate")],
)
def test_any_batch_gives_the_same(
    fused, seeded, natural_images, tmp_path, precision, schedule, method
):
    path = tmp_path / "model.onnx"
    tomexport.export(seeded("test_vit"), schedule, path, method=method, batch=None, verify=False)
    images = natural_images(160)[:3]
    quick = tomexport.load(path, "openvino", precision=precision)
    exact = tomexport.load(path, "onnxruntime", kernels="off")
    for batch in (images, images[:1]):
        found, expected = quick(batch), exact(batch)
        assert np.abs(found - expected).max() < (1e-5 if precision == "f32" else 0.05)
        assert found.dtype == np.float32


X, SCALAR, SIGNAL, TARGET = (1, 41, 24), (1, 41, 1), (1, 1, 41, 16), (1, 41)
INPUTS = {"Merge": (X, SCALAR, SIGNAL), "Reduce": (X, SCALAR, TARGET, SCALAR)}
ATTRIBUTES = {"Merge": {"r": 8, "n_prefix": 1}, "Reduce": {"r": 8, "mean": 1}}


def chain(
    library,
    kind="Merge",
    *,
    axes=(-1,),
    epsilon_inside=True,
    variance=True,
    weight=(24,),
    spy=False,
):
    """A reduction and a norm: a LayerNorm over channels, unless told otherwise."""
    factory = NodeFactory()
    factory.add_extension(str(library))
    types = ((s, openvino.Type.i64 if s == TARGET else F32) for s in INPUTS[kind])
    inputs = [ops.parameter(*each) for each in types]
    merge = factory.create(kind, inputs, ATTRIBUTES[kind])
    mode = "inside_sqrt" if epsilon_inside else "outside_sqrt"
    mvn = ops.mvn(merge.output(0), ops.constant(list(axes)), variance, 1e-6, mode)
    rng = np.random.default_rng(0)
    scaled = ops.multiply(mvn, ops.constant(rng.standard_normal(weight).astype(np.float32)))
    norm = ops.add(scaled, ops.constant(rng.standard_normal(24).astype(np.float32)))
    results = [norm.output(0), *merge.outputs()[1:], *([scaled.output(0)] if spy else [])]
    return openvino.Model(results, inputs, "chain")


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_any_operator_takes_over_a_norm_and_computes_the_same(library, kind, bfloat16):
    model = chain(library, kind)
    openvino_graph.prepare(model, library, bfloat16=bfloat16)
    assert kinds(model)["MVN"] == 0
    random = np.random.default_rng(1)
    arrays = [
        np.arange(41)[None] % 33
        if s == TARGET
        else random.integers(8, 24, s).astype(np.float32) / 16
        for s in INPUTS[kind]
    ]
    before, after = (
        openvino.Core().compile_model(m, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(arrays)
        for m in (chain(library, kind), model)
    )
    atol = 0.1 if bfloat16 else 1e-5
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=atol)
    np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.parametrize(
    "other",
    [
        {"axes": (1,)},
        {"axes": (1, 2)},
        {"epsilon_inside": False},
        {"variance": False},
        {"weight": (33, 1)},
        {"spy": True},
    ],
    ids=str,
)
def test_another_norm_stays_as_it_is(library, other):
    fusible = chain(library)
    openvino_graph.prepare(fusible, library, bfloat16=False)
    assert kinds(fusible)["MVN"] == 0
    model = chain(library, **other)
    openvino_graph.prepare(model, library, bfloat16=False)
    assert kinds(model)["MVN"] == 1
    assert len(merges(model)[0].outputs()) == 3


def test_a_graph_that_cannot_be_prepared_is_refused(files, fused, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(openvino_graph, "prepare", fail)
    library = build.library("openvino", OpenVino().version())
    with pytest.raises(BackendError, match=r"OpenVINO cannot compile .*: no such operator"):
        tomexport.load(files / "model.onnx", "openvino", kernels=library)
