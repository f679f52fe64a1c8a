"""EViT, Top-K and random selection against rules written by hand, and in both runtimes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import tomexport
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block
from tomexport.errors import PlanError, RewriteError, UnknownNameError
from tomexport.exporter.methods.method import View
from tomexport.exporter.methods.selection import squeeze_best

NAME = "deit_tiny_patch16_224"
# two implementations in float32, 12 blocks: measured 2e-6 of the largest output
TOLERANCE = 1e-5


def _evit(places, share, fuse):
    def rule(block: Block):
        if block.index not in places:
            return block.x, block.sizes
        scores = block.attention[:, 0, 1:].mean(0).tolist()
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        n = math.ceil(share * len(scores))
        kept, others = ranked[:n], ranked[n:]
        patches = block.x[1:]
        rows = [block.x[0], *(patches[i] for i in kept)]
        if fuse and others:
            rows.append(sum(scores[i] * patches[i] for i in others))
        return torch.stack(rows), torch.ones(len(rows))

    return rule


@pytest.mark.parametrize(
    ("method", "fuse"), [("evit", True), ("evit:fuse=no", False), ("topk", False)]
)
@pytest.mark.parametrize("share", [0.7, 0.5])
def test_the_best_are_kept_as_by_hand(seeded, natural_images, method, fuse, share):
    model, image = seeded(NAME), torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, f"keep:{share}@3,6,9", method=method)
    with torch.no_grad():
        expected = by_hand.forward(model, image, between=_evit((3, 6, 9), share, fuse))
        found, decisions = reduced.trace(image)
        assert (found - model(image)).abs().max() > 1e-3, "nothing was removed"
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    for step, decision in zip([s for s in reduced.plan.steps if s.removed], decisions, strict=True):
        slots = decision.target[0].tolist()
        assert sorted({s for s in slots if s >= 0}) == list(range(step.tokens_out))
        assert (-1 in slots) != fuse


# the papers' counts of DeiT-S, class token included, and its GMACs
EVIT = {
    ("evit", 0.9): (179, 163, 148, 4.02),
    ("evit", 0.8): (159, 129, 105, 3.48),
    ("evit", 0.7): (140, 100, 72, 3.03),
    ("evit", 0.6): (120, 74, 46, 2.64),
    ("evit", 0.5): (100, 52, 28, 2.31),
    ("evit:fuse=no", 0.9): (178, 161, 145, 3.99),
    ("evit:fuse=no", 0.8): (158, 127, 102, 3.44),
    ("evit:fuse=no", 0.7): (139, 98, 69, 3.00),
    ("evit:fuse=no", 0.6): (119, 72, 44, 2.61),
    ("evit:fuse=no", 0.5): (99, 50, 26, 2.28),
}


@pytest.mark.parametrize(("asked", "published"), EVIT.items(), ids=str)
def test_counts_and_macs_are_the_papers(asked, published):
    method, share = asked
    plan = tomexport.plan("deit_small_patch16_224", f"keep:{share}@3,6,9", method=method)
    counts = tuple(plan.steps[place].tokens_out for place in (3, 6, 9))
    assert counts == published[:3]
    assert plan.macs / 1e9 == pytest.approx(published[3], rel=0.01)


def test_counts_remove_as_many_as_they_say():
    plan = tomexport.plan(NAME, "const:13", method="evit")
    assert [step.removed for step in plan.steps] == [13] * 12


def test_random_keeps_the_same_tokens_of_every_image(seeded, natural_images):
    model, images = seeded(NAME), torch.from_numpy(natural_images(224)[:2])
    reduced = tomexport.reduce(model, "keep:0.7@3,6,9", method="random")

    def rule(block: Block):
        if block.index not in (3, 6, 9):
            return block.x, block.sizes
        n = len(block.x) - 1
        order = np.random.default_rng(n).permutation(n).tolist()
        kept = sorted(range(n), key=lambda i: -order[i])[: math.ceil(0.7 * n)]
        return torch.stack([block.x[0], *(block.x[1 + i] for i in kept)]), block.sizes

    with torch.no_grad():
        found, decisions = reduced.trace(images)
        for image, row in zip(images, found, strict=True):
            expected = by_hand.forward(model, image[None], between=rule)[0]
            assert (row - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert decisions == [], "nothing depends on the image"


@pytest.mark.parametrize("method", ["evit", "evit:fuse=no", "topk", "random"])
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(seeded, tmp_path, method, suffix):
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(seeded("test_vit"), "keep:0.7@1,3", path, method=method)
    assert report.verify.passed
    assert report.metadata.plan.method == method
    assert len(report.metadata.decisions) == (0 if method == "random" else 2)
    if suffix == ".onnx":
        assert {run.name.split()[0] for run in report.verify.runs} == {"onnxruntime", "openvino"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("evit:fuse=maybe", NAME), UnknownNameError, "Unknown fuse of evit 'maybe'"),
        (("evit:metric=k", NAME), UnknownNameError, "Unknown option of evit 'metric'"),
        (("evit", "sret_t"), RewriteError, "which the family 'sret' does not give"),
        (("random", "sret_t"), RewriteError, "needs all of them again between its stages"),
        (("topk", "vit_base_patch16_siglip_224"), RewriteError, "what the class token attends to"),
    ],
)
def test_refuses(seeded, arguments, error, message):
    method, name = arguments
    with pytest.raises(error, match=message):
        tomexport.reduce(seeded(name), "keep:0.7@3", method=method)


def test_refuses_to_fuse_one_token():
    with pytest.raises(PlanError, match="leaves one over"):
        tomexport.plan(NAME, "keep:0.99@3,6", method="evit")


def test_who_is_kept_leads_those_that_join():
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]]])  # the first of each pair goes
    step = dataclasses.replace(tomexport.plan(NAME, "none").steps[0], tokens_in=4, tokens_out=2)
    view = View(x, x, torch.ones(1, 4, 1), None, step, n_prefix=0)
    choice = squeeze_best(view, torch.tensor([[0.1, 0.2, 0.9, 0.8]]))
    assert choice.target.tolist() == [[0, 1, 0, 1]]
    assert choice.leads.tolist() == [[False, False, True, True]]
