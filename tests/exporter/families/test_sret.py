"""Merging in SReT: the published counts, the rule by hand, and the files that come of it."""

from __future__ import annotations

import collections
import json

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

import tomexport
from tests.exporter import sret_by_hand
from tests.exporter.methods import test_pitome
from tomexport import pipeline
from tomexport.artifact import DOMAIN
from tomexport.cli import cli
from tomexport.errors import RewriteError
from tomexport.exporter.models import sret
from tomexport.exporter.rewrite import _restored, _slots, _Stage

HEADS = (2, 4, 8)
TOLERANCE = 1e-5  # float32 against float64: measured 2e-6 of the largest output
# schedule: tokens removed in all, and GFLOPs as the slides count them
PUBLISHED = {
    "const:10": (230, 1.318),
    "const:20": (328, 1.057),
    "linear:10": (223, 1.464),
    "linear:20": (382, 1.071),
    "exp:0.10,0.6": (235, 1.606),
    "exp:0.25,0": (264, 1.489),
    "exp:0.40,0.2": (530, 1.132),
}


def _plan(name, schedule):
    done = CliRunner().invoke(cli, ["plan", name, "--schedule", schedule, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# --- counts


@pytest.mark.parametrize(("schedule", "published"), PUBLISHED.items())
def test_totals_and_flops_are_the_published(schedule, published):
    plan = _plan("sret_t", schedule)
    counts = [plan[name] for name in ("macs", "flops_slides", "removed_total")]
    assert all(type(count) is int for count in counts)
    assert (plan["removed_total"], round(plan["flops_slides"] / 1e9, 3)) == published


@pytest.mark.parametrize(
    ("name", "gmacs", "gflops"),
    [
        ("sret_t", 1.112, 1.9084),
        ("sret_t_wo_slice", 1.366, 1.9084),
        ("sret_lt", 1.164, 2.0124),
        ("sret_lt_wo_slice", 1.418, 2.0124),
        ("sret_lt_16_14_1", 1.225, 2.0124),
        ("sret_s", 4.173, 7.7225),
        ("sret_s_wo_slice", 4.671, 7.7225),
        ("sret_t_wo_slice_distill_384", 6.408, 5.607),
        ("sret_s_wo_slice_384", 18.443, 22.693),
        ("sret_s_wo_slice_distill_512", 42.672, 40.342),
        ("deit_tiny_distilled_patch16_224", 1.261, 2.168),  # the slides' other model
    ],
)
def test_unreduced_costs_are_the_published(name, gmacs, gflops):
    plan = tomexport.plan(name, "none")
    assert round(plan.macs / 1e9, 3) == gmacs
    assert plan.flops_slides / 1e9 == pytest.approx(gflops, abs=6e-4)
    assert (plan.flops_slides, plan.macs) == (plan.flops_slides_unreduced, plan.macs_unreduced)


def test_the_plan_says_stages_calls_and_alignment():
    sites = _plan("sret_t", "const:10")["sites"]
    assert [(s["stage"], s["call"]) for s in sites] == [
        (stage, call) for stage, n in enumerate((4, 10, 6)) for call in range(n)
    ]
    assert [s["multiple"] for s in sites] == [8] * 4 + [4] * 10 + [1] * 6
    assert [s["slices"] for s in sites] == [8, 2] * 2 + [4, 1] * 5 + [1] * 6
    restored = {i: s["restored"] for i, s in enumerate(sites) if s["restored"]}
    assert restored == {3: 784, 13: 196}
    assert sites[1]["block"] == "transformers.0.blocks.2"
    shown = CliRunner().invoke(cli, ["plan", "sret_t", "--schedule", "const:10"]).output
    assert "1.318 of 1.908" in shown
    row = next(line for line in shown.splitlines() if "transformers.0.blocks.6" in line)
    assert row.split()[1:7] == ["0.3", "8", "736", "10", "16", "*"]
    assert "720 → 784" in row


# --- the rule by hand


def _compare(model, schedule, image, heads=HEADS, slices=sret_by_hand.SLICED, **options):
    reduced = tomexport.reduce(model, schedule, **options)
    removals = [step.removed for step in reduced.plan.steps]
    with torch.no_grad():
        found, decisions = reduced.trace(image[None])
        expected = sret_by_hand.forward(
            reduced.net.state_dict(), image, heads, slices, removals,
            prop_attn=options.get("prop_attn", True),
        )  # fmt: skip
    assert [d.target[0].tolist() for d in decisions] == expected.targets
    error = (found[0] - expected.logits).abs().max()
    assert error <= TOLERANCE * expected.logits.abs().max()
    return reduced, expected


@pytest.mark.parametrize("schedule", ["const:10", "linear:10", "exp:0.10,0.6", "exp:0.25,0"])
def test_targets_and_logits_equal_the_rule_by_hand(seeded, natural_images, schedule):
    model, image = seeded("sret_t"), torch.from_numpy(natural_images(224)[1])
    _, by_hand = _compare(model, schedule, image)
    with torch.no_grad():
        original = model(image[None])[0]
    assert (by_hand.logits - original).abs().max() > 1e-3, "merging changed nothing"
    assert [sum(sizes) for sizes in by_hand.sizes_at_stage_ends] == [784, 196, 49]
    for firsts in by_hand.first_patches:  # raster order: a token stands at its first patch's place
        assert firsts == sorted(firsts)


def test_where_tokens_go_before_a_block_its_order_is_of_those_left(seeded, natural_images):
    """dTPS squeezes before the block: slices and their orders are of what the attention sees."""
    image = torch.from_numpy(natural_images(64)[:1])
    reduced = tomexport.reduce(
        "sret_t", "keep:0.7@1,2", method="dtps", random_weights=0, img_size=(64, 64)
    )
    assert [step.attended for step in reduced.plan.steps[:4]] == [64, 40, 24, 24]
    with torch.no_grad():
        assert reduced(image).isfinite().all()


def test_pitome_merges_in_stages_as_by_hand(seeded, natural_images):
    """Slots in raster order, as SReT's slices need them; PiToMe's own order is by energy."""
    image = torch.from_numpy(natural_images(64)[1])  # few tokens: float32 orders them as float64
    reduced = tomexport.reduce(seeded("sret_t"), "exp:0.3,0.5", method="pitome", img_size=(64, 64))
    removals = [step.removed for step in reduced.plan.steps]
    with torch.no_grad():
        found, decisions = reduced.trace(image[None])
        expected = sret_by_hand.forward(
            reduced.net.state_dict(), image, HEADS, removals=removals, prop_attn=False,
            groups_of=lambda call, keys, r: test_pitome.groups(keys, r, call, len(removals)),
        )  # fmt: skip
    assert [d.target[0].tolist() for d in decisions] == expected.targets
    error = (found[0] - expected.logits).abs().max()
    assert error <= TOLERANCE * expected.logits.abs().max()


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("sret_lt_16_14_1", ((16, 1), (14, 1), (1, 1))),
        ("sret_lt_wo_slice", ((1, 1), (1, 1), (1, 1))),
    ],
)
def test_other_slices_equal_the_rule_by_hand(seeded, natural_images, name, slices):
    image = torch.from_numpy(natural_images(224)[0])
    reduced, _ = _compare(seeded(name), "exp:0.2,0.3", image, slices=slices)
    for step in reduced.plan.steps:
        assert step.tokens_out % slices[step.stage][0] == 0


def test_without_proportional_attention(seeded, natural_images):
    image = torch.from_numpy(natural_images(224)[2])
    _compare(seeded("sret_t"), "exp:0.25,0", image, prop_attn=False)


@pytest.mark.parametrize(
    ("schedule", "size", "counts"),
    [
        ("const:20", 224, {4: 2, 2: 1}),  # r is half of an even count, down to one token
        ("list:" + "0," * 14 + "24,12,6,3,2,1", 224, {25: 13, 4: 2, 2: 1}),
        ("exp:0.25,0", 384, {2304: 1728, 576: 432, 144: 108}),
        ("exp:0.25,0", 512, {4096: 3072, 1024: 768, 256: 192}),
        ("const:0", 64, {}),
    ],
    ids=["const20", "halves", "384", "512", "64"],
)
def test_edges(seeded, natural_images, schedule, size, counts):
    model = seeded("sret_t")
    reduced = tomexport.reduce(model, schedule, img_size=(size, size))
    steps = {step.tokens_in: step.tokens_out for step in reduced.plan.steps if step.removed}
    assert counts.items() <= steps.items()
    with torch.no_grad():
        output = reduced(torch.from_numpy(natural_images(size)[:2]))
    assert output.shape == (2, 1000)
    assert output.isfinite().all()


def test_an_image_that_is_not_square(seeded):
    reduced = tomexport.reduce(seeded("sret_t"), "const:8", img_size=(192, 320))
    with torch.no_grad():
        assert reduced(torch.zeros(1, 3, 192, 320)).shape == (1, 1000)
    assert [s.tokens_in for s in reduced.plan.steps if not s.call] == [960, 240, 60]


def test_sizes_and_seeds_that_cannot_be(seeded):
    with pytest.raises(RewriteError, match="patches of 32×32; the nearest that does is 224×224"):
        tomexport.reduce(seeded("sret_t"), "none", img_size=(230, 230))
    with pytest.raises(RewriteError, match="tokens in their own order, so there is nothing"):
        tomexport.reduce(seeded("sret_t_wo_slice"), "none", permutation_seed=1)
    with pytest.raises(RewriteError, match="tokens in their own order"):
        tomexport.reduce(seeded("test_vit"), "none", permutation_seed=1)
    with pytest.raises(RewriteError, match=r"--permutation-seed .* is no seed"):
        tomexport.reduce(seeded("sret_t"), "none", permutation_seed=2**64)


def test_tokens_come_back_through_all_maps():
    x = torch.tensor([10.0, 20, 30]).reshape(1, 3, 1)
    targets = [torch.tensor([[0, 1, 1, 2, 3]]), torch.tensor([[0, 1, 0, 2]])]
    slot = _slots(targets[1], _slots(targets[0], None))
    found = _restored(x, _Stage(slot=slot), 5)
    assert found.flatten().tolist() == [10, 20, 20, 10, 30]


# --- what really runs


def _products(model):
    """Products of linear layers and convolutions, of attention, and normalised elements."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    shape = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    constant = {i.name: list(i.dims) for i in inferred.graph.initializer}
    count = collections.Counter()
    for node in inferred.graph.node:
        if node.op_type == "LayerNormalization":
            count["norm"] += np.prod(shape[node.input[0]])
        elif node.op_type == "Conv":
            count["linear"] += np.prod(shape[node.output[0]]) * np.prod(
                constant[node.input[1]][1:], dtype=int
            )
        elif node.op_type in ("MatMul", "Gemm"):
            inner = shape[node.input[0]][-1]
            kind = "linear" if node.input[1] in constant else "attention"
            count[kind] += np.prod(shape[node.output[0]]) * inner
    return {kind: int(number) for kind, number in count.items()}


@pytest.mark.parametrize("schedule", list(PUBLISHED))
def test_counts_are_of_the_shapes_that_run(seeded, schedule):
    """By hooks on the module, for all schedules; and on the file, below."""
    reduced = tomexport.reduce(seeded("sret_t"), schedule)
    linear = norm = 0

    def count(module, inputs, output):
        nonlocal linear, norm
        if isinstance(module, torch.nn.Linear):
            linear += module.in_features * output.numel()
        elif isinstance(module, torch.nn.Conv2d):
            linear += module.weight[0].numel() * output.numel()
        elif isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d):
            norm += output.numel()

    for module in reduced.net.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        reduced(torch.zeros(1, 3, 224, 224))
    assert reduced.plan.flops_slides == 2 * (linear + 4 * norm)


@pytest.fixture(scope="module", params=["const:10", "exp:0.25,0"])
def exported(request, seeded, tmp_path_factory):
    path = tmp_path_factory.mktemp("sret") / "model.onnx"
    report = tomexport.export(seeded("sret_t"), request.param, path, verify=False)
    return report, onnx.load(path)


def test_the_file_computes_what_the_plan_counts(exported):
    report, model = exported
    found, plan = _products(model), report.metadata.plan
    assert plan.macs == found["linear"] + found["attention"]
    stem = 32 * 112**2 + 64 * 56**2 + 64 * 28**2  # batch norm, which the file holds folded
    assert plan.flops_slides == 2 * (found["linear"] + 4 * (found["norm"] + stem))


def test_the_file_is_static_and_holds_each_weight_once(exported):
    _, model = exported
    onnx.checker.check_model(model, full_check=True)
    kinds = {node.op_type for part in (model.graph, *model.functions) for node in part.node}
    assert not {kind for kind in kinds if kind.startswith(("Random", "Bernoulli"))}
    assert not kinds & {"Shape", "Range", "Where", "Expand", "ConstantOfShape", "NonZero", "If"}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for value in [*inferred.graph.value_info, *inferred.graph.output]:
        assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim), value.name
    n_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert 4 * 4_700_000 < n_bytes <= 19.3e6


def test_the_file_holds_the_order_of_its_seed(exported):
    report, model = exported
    assert report.metadata.permutation_seed == 0
    arrays = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
    stored = {a.tobytes() for a in arrays if a.dtype == np.int64 and a.ndim == 1}
    counts = [s.tokens_in for s in report.metadata.plan.steps if s.stage == 0 and s.call % 2]
    for n in counts:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        assert order.numpy().tobytes() in stored
        assert order.argsort().numpy().tobytes() in stored


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_file_equals_pytorch_on_photographs(exported, seeded, natural_images, backend):
    report, model = exported
    images = natural_images(224)
    reduced = tomexport.reduce(seeded("sret_t"), report.metadata.plan.schedule)
    with torch.no_grad():
        expected, decisions = reduced.trace(torch.from_numpy(images))
    runner = tomexport.load(
        report.path, backend, precision="f32", extra_outputs=report.metadata.decisions
    )
    n_alike = 0
    for i, image in enumerate(images):
        found, *targets = runner.outputs(image[None])
        alike = [
            (t[0] == d.target[i].numpy()).all() for t, d in zip(targets, decisions, strict=True)
        ]
        if all(alike):
            n_alike += 1
            assert np.abs(found[0] - expected[i].numpy()).max() <= 1e-4
        else:  # only where PyTorch's own choice was nearly tied
            assert decisions[alike.index(False)].margin[i] <= 1e-5
    assert n_alike >= 2
    assert {node.op_type for node in model.graph.node if node.domain == DOMAIN} == {"Merge"}


@pytest.fixture
def shallow(monkeypatch):
    """SReT with two calls a stage: what costs time in export is their number."""
    monkeypatch.setattr(sret, "_DEPTHS", (2, 2, 2))


def test_a_file_is_proven_described_and_compared_again(shallow, tmp_path):
    path = tmp_path / "model.onnx"
    report = tomexport.export("sret_t", "exp:0.1,0", path, random_weights=1, permutation_seed=5)
    assert report.verify.passed
    assert pipeline.describe(path).permutation_seed == 5
    assert pipeline.describe(path).names == ("sret_t",)
    golden, _ = pipeline.reference(path, "sret_t")
    assert tomexport.verify(path, golden=golden).passed


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_fused_kernels_keep_the_raster_order(exported, fused, natural_images, backend):
    report, _ = exported
    image = natural_images(224)[1:2]
    standard, other = (
        tomexport.load(report.path, backend, precision="f32", kernels=kernels)
        for kernels in ("off", "auto")
    )
    assert other.kernels
    assert not standard.kernels
    assert np.abs(standard(image) - other(image)).max() <= 1e-4


def test_the_bound_brings_tokens_back_by_a_constant(shallow, tmp_path):
    path = tmp_path / "model.onnx"
    tomexport.export("sret_t", "const:10", path, method="bound", random_weights=0, verify=False)
    kinds = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    assert not {"GatherND", "GatherElements", "OneHot"} & set(kinds)
    assert kinds["Slice"] == 6
    output = tomexport.load(path, "onnxruntime")(np.zeros((1, 3, 224, 224), np.float32))
    assert output.shape == (1, 1000)
