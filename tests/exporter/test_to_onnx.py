"""The graph: what it is made of, that its shapes are known, that it computes what torch does."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
import torch

import tomexport
from tests.optimized import optimized
from tomexport import delivery, pipeline
from tomexport.artifact import DOMAIN

BANNED = {"Shape", "Range", "Where", "Expand", "ConstantOfShape", "NonZero", "If", "Loop"}
PUBLISHED_PATCH_NODES = 806  # of the published ToMe patch, DeiT-Tiny r=8 batch 1, same exporter


@pytest.fixture(scope="module")
def exported(seeded, tmp_path_factory):
    """Export a model once per set of arguments: → (path, loaded proto)."""
    cache = {}

    def export(model, schedule, **options):
        key = (id(model), schedule, *sorted(options.items()))
        if key not in cache:
            path = tmp_path_factory.mktemp("exported") / "model.onnx"
            tomexport.export(model, schedule, path, verify=False, **options)
            cache[key] = path, onnx.load(path)
        return cache[key]

    return export


def _shapes(model):
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    return {
        v.name: [d.dim_value or d.dim_param or None for d in v.type.tensor_type.shape.dim]
        for v in values
    }


def test_portable_deit_tiny_is_small_and_static(exported, seeded):
    _, model = exported(seeded("deit_tiny_patch16_224"), "const:8", ops="portable")
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert not BANNED & set(kinds)
    assert len(model.graph.node) < PUBLISHED_PATCH_NODES
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]


@pytest.mark.parametrize("ops", ["custom", "portable"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_intermediate_shape_is_known(exported, seeded, ops, batch):
    _, model = exported(seeded("test_vit"), "const:8", ops=ops, batch=batch)
    onnx.checker.check_model(model, full_check=True)
    shapes = _shapes(model)
    for node in model.graph.node:
        for name in node.output:
            assert name in shapes, f"{node.op_type} → {name} has no shape"
            assert all(isinstance(dim, int) and dim > 0 for dim in shapes[name]), (
                name,
                shapes[name],
            )


def test_dynamic_batch_leaves_only_the_batch_open(exported, seeded):
    _, model = exported(seeded("test_vit"), "const:8", batch=None)
    for name, dims in _shapes(model).items():
        assert all(isinstance(dim, int) for dim in dims[1:]), (name, dims)


def test_custom_file_has_one_node_per_reduction_with_a_body(exported, seeded):
    path, model = exported(seeded("test_vit"), "list:8,0,8,8")
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == ["Merge"] * 3
    assert [node.output[-1] for node in nodes] == list(pipeline.describe(path).decisions)
    bodies = {(f.domain, f.name, f.overload) for f in model.functions}
    assert {(n.domain, n.op_type, n.overload) for n in nodes} == bodies
    assert model.ir_version == 10
    for function in model.functions:
        assert not BANNED & {node.op_type for node in function.node}


@pytest.mark.parametrize(
    ("method", "kinds"), [("topk", ["Rank", "Reduce"]), ("random", ["Reduce"])]
)
def test_ranking_is_a_node_that_decides_nothing(exported, seeded, method, kinds):
    path, model = exported(seeded("test_vit"), "list:8,0,8,8", method=method)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == kinds * 3
    decisions = ("decision_0", "decision_1", "decision_2") if "Rank" in kinds else ()
    assert pipeline.describe(path).decisions == decisions


def test_equal_sites_share_a_body(exported, seeded):
    _, model = exported(seeded("test_vit"), "exp:0.25,0")
    assert len(model.functions) == 1


def test_weights_are_stored_once(exported, seeded):
    model = seeded("test_vit")
    path, _ = exported(model, "none")
    n_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    # golden set and metadata are text of well under 0.2 MB
    assert n_bytes < path.stat().st_size < n_bytes + 300_000


@pytest.mark.parametrize("ops", ["custom", "portable"])
def test_products_stay_products(exported, seeded, tmp_path, ops):
    path, model = exported(seeded("deit_tiny_patch16_224"), "const:8", ops=ops)
    n_linear = 4 * 12  # qkv, projection and both of the MLP
    kinds = optimized(path, tmp_path)
    assert kinds["Gemm"] == 1  # the head
    assert kinds["MatMul"] >= n_linear
    written = collections.Counter(node.op_type for node in model.graph.node)
    assert kinds["Reshape"] <= written["Reshape"]


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opsets(exported, seeded, natural_images, opset):
    model = seeded("test_vit")
    path, proto = exported(model, "const:8", opset=opset)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    assert all(f.opset_import[0].version == opset for f in proto.functions)
    _equal_to_torch(path, tomexport.reduce(model, "const:8"), natural_images(160)[:1])


def _equal_to_torch(path, reduced, images):
    with torch.no_grad():
        expected = reduced(torch.from_numpy(images)).numpy()
    for backend in ("onnxruntime", "openvino"):
        found = tomexport.load(path, backend=backend, precision="f32")(images)
        assert np.abs(found - expected).max() <= 1e-4, backend


@pytest.mark.parametrize("ops", ["custom", "portable"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 4}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 3, "img_size": 112, "num_classes": 9}),
        ("test_vit3", {}),  # attention pooling
        ("vit_tiny_patch16_224", {"depth": 3, "global_pool": "avg", "class_token": False}),
        ("vit_tiny_patch16_224", {"depth": 3, "qk_norm": True, "num_classes": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_families_equal_torch_on_photographs(exported, seeded, natural_images, name, options, ops):
    model = seeded(name, **options)
    reduced = tomexport.reduce(model, "const:10")
    path, _ = exported(model, "const:10", ops=ops)
    _equal_to_torch(path, reduced, natural_images(reduced.input_shape[1])[:1])


def test_dynamic_batch_gives_the_same_rows(exported, seeded, natural_images):
    path, _ = exported(seeded("test_vit"), "const:8", batch=None)
    names = pipeline.describe(path).decisions
    images = np.concatenate([natural_images(160), natural_images(160)[:, :, ::-1]])
    for backend in ("onnxruntime", "openvino"):
        model = tomexport.load(path, backend, precision="f32", extra_outputs=names)
        full, *decisions = model.outputs(images)
        for batch in (1, 3):
            rows, *others = model.outputs(images[:batch])
            assert np.abs(rows - full[:batch]).max() <= 1e-5
            for one, other in zip(decisions, others, strict=True):
                assert (one[:batch] == other).all()


def test_weights_from_2_gb_on_go_to_a_second_file(seeded, tmp_path, monkeypatch, natural_images):
    monkeypatch.setattr(delivery, "_TWO_GB", 1000)
    path = tmp_path / "model.onnx"
    model = seeded("test_vit")
    report = tomexport.export(model, "const:8", path)
    assert report.verify.passed
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.stat().st_size < 400_000
    _equal_to_torch(path, tomexport.reduce(model, "const:8"), natural_images(160)[:1])
