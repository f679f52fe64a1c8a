"""PVT and CvT reduced: by hand, their costs, what is refused, and both runtimes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tomexport
from tests.exporter.hybrids import (
    CVT_HEADS,
    PVT_HEADS,
    by_hand,
    reduced_by,
    small_cvt,
    small_pvt,
)
from tomexport.calib.trace import Tracer
from tomexport.errors import RewriteError
from tomexport.exporter.methods import method_of
from tomexport.exporter.rewrite import ReducedModel
from tomexport.exporter.source import find
from tomexport.exporter.zoo import timm

# family: model, heads, and a schedule that removes tokens in each stage, in one of them twice
CASES = {
    "pvt": (small_pvt, PVT_HEADS, "keep:0.7,0.7,0.4,0.6,0.5@0,1,2,3,5"),
    "cvt": (small_cvt, CVT_HEADS, "keep:0.7,0.7,0.6,0.4@0,1,2,3"),
}
MERGING, MERGES = "tome:metric=x-before", "list:60,9,3,2,1"
# float32 against float64, of the largest output
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return CASES[case][0]()


@pytest.fixture(scope="module")
def schedule(case):
    return CASES[case][2]


@pytest.fixture
def images(natural_images):
    return torch.from_numpy(natural_images(64)[:2])


def test_plans_know_the_stages_and_their_class_token(case, model, schedule):
    plan = reduced_by(model, schedule, "dtps").plan
    counts = [(step.stage, step.n_prefix, step.attended, step.restored) for step in plan.steps]
    assert counts == {
        "pvt": [(0, 0, 179, 256), (1, 0, 44, None), (1, 0, 25, 64), (2, 0, 9, 16),
                (3, 1, 5, None), (3, 1, 3, None)],
        "cvt": [(0, 0, 179, 256), (1, 0, 44, 64), (2, 1, 10, None), (2, 1, 7, None),
                (2, 1, 7, None)],
    }[case]  # fmt: skip
    assert plan.n_prefix == 1


def test_logits_equal_the_rule_by_hand(case, model, schedule, images):
    reduced = reduced_by(model, schedule, "dtps")
    with torch.no_grad():
        found, original = reduced(images)[0], model(images)[0]
    expected = by_hand(model, reduced, images[0], CASES[case][1])
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (found - original).abs().max() > 1e-3, "nothing was removed"


def test_every_place_of_the_grid_has_a_token(model, schedule, images):
    reduced = reduced_by(model, schedule, "dtps")
    with torch.no_grad():
        maps = iter([decision.target[0] for decision in reduced.trace(images)[1]])
    for step in reduced.plan.steps:
        if step.call == 0:
            slot = torch.arange(step.tokens_in)
        if step.removed:
            slot = next(maps)[slot]
        assert slot.unique().tolist() == list(range(step.tokens_out))
        assert slot[: step.n_prefix].tolist() == list(range(step.n_prefix))
    assert next(maps, None) is None


@pytest.mark.parametrize("text", [MERGING, "tome:metric=q"])
def test_sizes_add_up_to_the_grid(model, images, text):
    """Where tokens merge between attention and MLP, as well."""
    found = reduced_by(model, MERGES, text)
    method, sums = method_of(text), []

    def spy(view):
        left = method.reduce(view)
        sums.append((view.step.stage, float(left.size[0].sum())))
        return left

    spied = dataclasses.replace(method, reduce=spy)
    with torch.no_grad():
        assert torch.equal(ReducedModel(model, found.plan, spied)(images), found(images))
    firsts = {step.stage: step.tokens_in for step in found.plan.steps if not step.call}
    assert len(sums) == found.plan.n_reductions >= 4
    assert all(total == pytest.approx(firsts[stage]) for stage, total in sums)


def test_keys_of_the_grid_are_not_weighed_and_those_of_tokens_are(images):
    model = small_pvt()

    def logits(schedule, prop_attn):
        with torch.no_grad():
            return tomexport.reduce(model, schedule, method=MERGING, prop_attn=prop_attn)(images)

    assert torch.equal(logits("list:60,9,9,3", True), logits("list:60,9,9,3", False))
    assert (logits("list:0,0,0,0,2", True) - logits("list:0,0,0,0,2", False)).abs().max() > 1e-4


@pytest.fixture(scope="module")
def exported(model, schedule, tmp_path_factory):
    """For any number of images that are not square."""
    path = tmp_path_factory.mktemp("hybrid") / "model.onnx"
    found = dataclasses.replace(find(model, img_size=(32, 64)), seed=0)
    return tomexport.export(found, schedule, path, method="dtps", batch=None)


def test_files_are_proven_in_both_runtimes(exported):
    assert exported.verify.passed
    assert {run.backend for run in exported.verify.runs} == {"onnxruntime", "openvino"}
    assert len(exported.metadata.decisions) == exported.metadata.plan.n_reductions >= 4


def test_files_say_which_patches_stand_together(exported, images):
    frames = Tracer.load(Path(exported.path))(images[0, :, :32].numpy())
    steps = exported.metadata.plan.steps
    assert [frame.tokens for frame in frames] == [step.tokens_out for step in steps]
    rows = [(8, 4, 2, 1)[step.stage] for step in steps]
    assert [frame.groups.shape for frame in frames] == [(n, 2 * n) for n in rows]


@pytest.mark.parametrize("text", ["none", MERGES])
def test_macs_are_of_what_runs(model, images, text):
    """Attention included, and that the class token alone is read; choosing would add its own."""
    reduced = reduced_by(model, text, "bound")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        reduced(images[:1])
    assert counter.get_total_flops() == 2 * (reduced.plan.macs - reduced.plan.macs_spared)


def test_counts_are_of_the_shapes_that_run(model, images):
    reduced = reduced_by(model, MERGES, MERGING, "tokens")
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
        reduced(images[:1])
    assert reduced.plan.flops_slides == 2 * (linear + 4 * norm)


def test_folded_weights_compute_the_same(model, schedule, images):
    reduced = reduced_by(model, schedule, "dtps")
    with torch.no_grad():
        expected, found = reduced(images), reduced.folded()(images)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_tokens_are_those_of_the_last_stage(model, schedule, images):
    whole = tomexport.reduce(model, "none", output_kind="tokens")
    reduced = reduced_by(model, schedule, "dtps", "tokens")
    with torch.no_grad():
        expected = model.forward_features(images)[:, 1:]
        assert (whole(images) - expected).abs().max() <= 2e-6 * expected.abs().max()
        tokens = reduced(images)
    assert tokens.shape == expected.shape
    assert len(tokens[0].unique(dim=0)) == reduced.plan.steps[-1].tokens_out - 1


def test_the_bound_fills_the_grid_evenly(model, schedule, images):
    reduced = reduced_by(model, schedule, "bound:dtps")
    with torch.no_grad():
        output, decisions = reduced.trace(images)
    assert output.isfinite().all()
    assert not decisions


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("dynamicvit", "drops tokens, and .* needs all of them again between its stages"),
        ("random", "drops tokens, and .* needs all of them again between its stages"),
        ("evit", r"needs class_attention, which the family .* it gives queries"),
        ("tome", "needs keys, which the family"),
    ],
)
def test_methods_that_cannot_be_right_are_refused(model, schedule, method, why):
    with pytest.raises(RewriteError, match=why):
        reduced_by(model, schedule, method)


@pytest.mark.parametrize("method", ["tome", "evit", "evo-vit", "dynamicvit"])
def test_nothing_removed_needs_nothing(model, images, method):
    with torch.no_grad():
        found, expected = reduced_by(model, "none", method)(images), model(images)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["pvt_tiny", "cvt_13"])
def test_without_classes_the_class_token_comes_out(name):
    options = {"img_size": 64, "num_classes": 0, "depths": (1,) * (4 if name == "pvt_tiny" else 3)}
    reduced = tomexport.reduce(timm().create_model(name, **options), "none")
    assert reduced.output == "features"
    with torch.no_grad():
        assert reduced(torch.zeros(1, 3, 64, 64)).shape == (1, 512 if name == "pvt_tiny" else 384)
