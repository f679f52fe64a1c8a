"""DynamicViT and dTPS against their rules written by hand, their checkpoints, both runtimes."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter import lvvit_by_hand
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block
from tomexport.errors import CheckpointError, PlanError, RewriteError
from tomexport.exporter.source import find

NAME = "vit_tiny_patch16_224"
METHODS = ["dynamicvit", "dtps"]
# two implementations in float32: measured 2e-6 of the largest output
TOLERANCE = 1e-5


def _predictors(width, n=3):
    """The keys of n predictors, with values from a seed."""
    generator = torch.Generator().manual_seed(5)
    layers = {"in_conv.1": (width, width), "out_conv.0": (width // 2, width),
              "out_conv.2": (width // 4, width // 2), "out_conv.4": (2, width // 4)}  # fmt: skip
    state = {}
    for i in range(n):
        at = f"score_predictor.{i}."
        state[f"{at}in_conv.0.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{at}in_conv.0.bias"] = 0.2 * torch.randn(width, generator=generator)
        for name, shape in layers.items():
            weight = torch.randn(shape, generator=generator)
            state[f"{at}{name}.weight"] = 2 * weight / shape[1] ** 0.5
            state[f"{at}{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)
    return state


def _scores(x, state, number):
    """The logarithm of the probability of each patch token to be kept."""

    def linear(x, name):
        at = f"score_predictor.{number}.{name}"
        return x @ state[f"{at}.weight"].to(x).T + state[f"{at}.bias"].to(x)

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    at = f"score_predictor.{number}.in_conv.0"
    u = x[1:] - x[1:].mean(1, keepdim=True)
    u = u / (u.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    z = gelu(linear(u * state[f"{at}.weight"].to(u) + state[f"{at}.bias"].to(u), "in_conv.1"))
    half = z.shape[1] // 2
    of_all = z[:, half:].mean(0)
    z = torch.stack([torch.cat([row[:half], of_all]) for row in z])
    for name in ("out_conv.0", "out_conv.2"):
        z = gelu(linear(z, name))
    z = linear(z, "out_conv.4")
    return (z[:, 0] - z.exp().sum(1).log()).tolist()


def _kept(method, x, scores, n):
    if method == "dtps":
        return by_hand.squeezed(x, scores, n)
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return torch.stack([x[0], *(x[1 + i] for i in ranked[:n])])


def _rule(method, state, kept):
    places = list(kept)

    def rule(block: Block):
        if block.index not in places:
            return block.x, block.sizes
        scores = _scores(block.x, state, places.index(block.index))
        x = _kept(method, block.x, scores, kept[block.index])
        return x, torch.ones(len(x))

    return rule


@pytest.fixture
def file(tmp_path):
    def save(model, own, start=""):
        path = tmp_path / "trained.pth"
        torch.save(
            {"model": {start + k: v for k, v in {**model.state_dict(), **own}.items()}}, path
        )
        return path

    return save


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_computes_what_the_rule_says(seeded, natural_images, file, method):
    model, own = seeded(NAME), _predictors(192)
    image = torch.from_numpy(natural_images(224)[:1])
    path = file(model, own, start="module.")
    reduced = tomexport.reduce(path, "keep:0.7@3,6,9", method=method, arch=NAME)
    rule = _rule(method, own, {3: 137, 6: 96, 9: 67})
    with torch.no_grad():
        expected = by_hand.forward(model, image, before=rule)
        found, decisions = reduced.trace(image)
        assert (found - model(image)).abs().max() > 1e-3, "nothing was removed"
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    dropped = [bool((decision.target < 0).any()) for decision in decisions]
    assert dropped == [method == "dynamicvit"] * 3


@pytest.mark.parametrize("method", METHODS)
def test_on_lvvit(seeded, natural_images, file, method):
    model, own = seeded("lvvit_s"), _predictors(384)
    image = torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(file(model, own), "keep:0.7@4,8,12", method=method)
    kept = {4: 137, 8: 96, 12: 67}
    places = list(kept)

    def before(index, x):
        if index not in kept:
            return x
        return _kept(method, x, _scores(x, own, places.index(index)), kept[index])

    with torch.no_grad():
        expected = lvvit_by_hand.forward(model.state_dict(), image[0], 6, before)
        found = reduced(image)[0]
    assert reduced.plan.model == "lvvit_s"
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(tmp_path, method, suffix):
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(
        "test_vit", "keep:0.7@1,3,4", path, method=method, random_weights=0, batch=None
    )
    assert report.verify.passed
    assert len(report.metadata.decisions) == 3, "a place before the last block counts as well"


# GMACs from the papers' formula, and those of DynamicViT's page, which drops the second decimal
COMPUTED = [
    (0.9, (177, 159, 143), 4.04),
    (0.8, (157, 126, 101), 3.46),
    (0.7, (138, 97, 68), 2.98),
    (0.6, (118, 71, 43), 2.56),
    (0.5, (99, 50, 25), 2.23),
]
PUBLISHED = [
    ("deit_small_patch16_224", "keep:0.7@3,6,9", 2.9),
    ("deit_base_patch16_224", "keep:0.7@3,6,9", 11.4),
    ("lvvit_s", "keep:0.7@4,8,12", 4.6),
    ("lvvit_s", "keep:0.5@4,8,12", 3.7),
    ("lvvit_m", "keep:0.7@5,10,15", 8.5),
]


@pytest.mark.parametrize(("share", "counts", "gmacs"), COMPUTED)
@pytest.mark.parametrize("method", METHODS)
def test_counts_and_macs_are_the_papers(share, counts, gmacs, method):
    plan = tomexport.plan("deit_small_patch16_224", f"keep:{share}@3,6,9", method=method)
    assert tuple(step.tokens_out for step in plan.steps if step.removed) == counts
    assert plan.macs / 1e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize(("name", "schedule", "gmacs"), PUBLISHED)
def test_macs_are_the_published(name, schedule, gmacs):
    plan = tomexport.plan(name, schedule, method="dynamicvit")
    assert plan.macs // 10**8 / 10 == gmacs


def test_a_file_does_not_say_which_of_the_two_it_is_of(seeded, file):
    path = file(seeded("test_vit"), _predictors(64))
    with pytest.raises(RewriteError, match="dynamicvit and dtps have alike"):
        tomexport.reduce(path, "keep:0.7@1,3,4")
    assert find(path).methods == ("dynamicvit", "dtps")


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("keep:0.7@1,3", "3 predictors, but the schedule removes tokens at 2 blocks"),
        ("const:4", "3 predictors, but the schedule removes tokens at 6 blocks"),
    ],
)
def test_each_predictor_needs_its_place(seeded, file, schedule, said):
    path = file(seeded("test_vit"), _predictors(64))
    with pytest.raises(PlanError, match=said):
        tomexport.reduce(path, schedule, method="dtps")


def test_nothing_removed_needs_no_predictors(seeded, file, natural_images):
    model = seeded("test_vit")
    image = torch.from_numpy(natural_images(160)[:1])
    reduced = tomexport.reduce(file(model, _predictors(64)), "none", method="dynamicvit")
    with torch.no_grad():
        assert (reduced(image) - model(image)).abs().max() <= 1e-5


def test_predictors_of_another_width_are_refused(seeded, file):
    path = file(seeded("test_vit"), _predictors(32))
    with pytest.raises(CheckpointError, match=r"in_conv.0.weight is 32, expected 64"):
        tomexport.reduce(path, "keep:0.7@1,3,4", method="dynamicvit")
