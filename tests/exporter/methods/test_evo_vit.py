"""Evo-ViT against its rule written by hand, its checkpoints, and in both runtimes."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block
from tomexport.errors import CheckpointError, PlanError, RewriteError
from tomexport.exporter.architecture import build
from tomexport.exporter.checkpoint import Checkpoint

NAME = "deit_tiny_patch16_224"
# two implementations in float32: measured 2e-6 of the largest output
TOLERANCE = 1e-5


class Evolution:
    """The rule, one image at a time: who is computed, who waits, and the scores of all."""

    def __init__(self, kept):
        self.kept = kept  # block → tokens that are computed from there on
        self.scores, self.computed, self.all = [], None, None

    def before(self, block: Block):
        if block.index not in self.kept:
            return block.x, block.sizes
        x = self.back(block.x)
        ranked = sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], i))
        self.computed, self.all = ranked[: self.kept[block.index]], x
        return torch.stack([x[0], *(x[1 + i] for i in self.computed)]), block.sizes

    def between(self, block: Block):
        attended = block.attention[:, 0, 1:].sum(0).tolist()
        if self.computed is None:
            self.scores = attended
        else:
            for i, new in zip(self.computed, attended, strict=True):
                self.scores[i] = 0.5 * self.scores[i] + 0.5 * new
        return block.x, block.sizes

    def back(self, x):
        """Put the computed tokens among those that waited."""
        if self.computed is None:
            return x
        whole = self.all.clone()
        whole[0] = x[0]
        for row, i in zip(x[1:], self.computed, strict=True):
            whole[1 + i] = row
        return whole


def _by_hand(model, image, kept):
    rule = Evolution(kept)
    return by_hand.forward(
        model, image, before=rule.before, between=rule.between, finally_=rule.back
    )


def _checkpoint(model):
    """The keys of a published file."""
    state = dict(model.state_dict())
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = state.pop(f"fc_norm.{kind}")
        for i in range(len(model.blocks)):
            qkv = state.pop(f"blocks.{i}.attn.qkv.{kind}")
            n = len(qkv) // 3
            state[f"qks.{i}.qk.{kind}"], state[f"vs.{i}.v.{kind}"] = qkv[: 2 * n], qkv[2 * n :]
            state[f"norms.{i}.{kind}"] = state.pop(f"blocks.{i}.norm1.{kind}")
            state[f"projs.{i}.{kind}"] = state.pop(f"blocks.{i}.attn.proj.{kind}")
        state[f"head_cls.{kind}"] = state[f"head.{kind}"] + 1
        state[f"norm_cls.{kind}"] = state[f"norm.{kind}"] + 1
    return state


def test_a_checkpoint_computes_what_the_rule_says(seeded, natural_images, tmp_path):
    model = seeded(NAME, global_pool="avg")
    image = torch.from_numpy(natural_images(224)[:1])
    torch.save({"model": _checkpoint(model)}, tmp_path / "evo.pth")
    reduced = tomexport.reduce(tmp_path / "evo.pth", "keep:0.5@4,8", arch=NAME)
    assert reduced.plan.method == "evo-vit", "the keys say so"
    with torch.no_grad():
        expected = _by_hand(model, image, {4: 98, 8: 98})
        found, decisions = reduced.trace(image)
        assert (found - model(image)).abs().max() > 1e-3, "none waited"
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert [int((decision.target < 0).sum()) for decision in decisions] == [98, 98]


@pytest.mark.parametrize(
    ("schedule", "kept"),
    [("list:0,60,30", {1: 40, 2: 70}), ("list:0,30,0,0,60,0", {1: 70, 4: 40})],
)
def test_scores_of_those_that_wait_and_of_those_that_do_not(seeded, natural_images, schedule, kept):
    model = seeded("test_vit")  # it reads its class token alone
    image = torch.from_numpy(natural_images(160)[:1])
    reduced = tomexport.reduce(model, schedule, method="evo-vit")
    with torch.no_grad():
        expected = _by_hand(model, image, kept)
        found = reduced(image)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(seeded, tmp_path, pool, suffix):
    path = tmp_path / f"model{suffix}"
    model = seeded("test_vit", global_pool=pool)
    report = tomexport.export(model, "keep:0.5@2,4", path, method="evo-vit", batch=None)
    assert report.verify.passed
    assert len(report.metadata.decisions) == 2


@pytest.mark.parametrize(("name", "gmacs"), [("small", 3.0), ("tiny", 0.8)])
def test_macs_are_the_published(name, gmacs):
    plan = tomexport.plan(f"deit_{name}_patch16_224", "keep:0.5@4,8", method="evo-vit")
    counts = [(step.tokens_in, step.tokens_out, step.restored) for step in plan.steps]
    half, last = (99, 99, None), (99, 99, 197)
    assert counts == 4 * [(197, 197, None)] + 2 * [(197, 99, None), half, half, last]
    assert plan.macs / 1e9 == pytest.approx(gmacs, abs=0.051)


def test_the_bound_has_the_same_counts(seeded, natural_images):
    image = torch.from_numpy(natural_images(160)[:1])
    model = seeded("test_vit")
    bound = tomexport.reduce(model, "keep:0.5@2,4", method="bound:evo-vit")
    own = tomexport.reduce(model, "keep:0.5@2,4", method="evo-vit")
    assert bound.plan.steps == own.plan.steps
    with torch.no_grad():
        assert bound.trace(image)[1] == []


def test_the_first_block_has_nothing_to_choose_by(seeded):
    with pytest.raises(PlanError, match="what earlier blocks attended to, and there is none"):
        tomexport.reduce(seeded("test_vit"), "const:8", method="evo-vit")


def test_a_model_without_a_class_token_is_refused(seeded):
    with pytest.raises(RewriteError, match="what the class token attends to"):
        tomexport.reduce(seeded("vit_base_patch16_siglip_224"), "keep:0.5@4", method="evo-vit")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vs.1.v.weight": None}, r"their values \(vs.1.v.weight\) are missing"),
        ({"vs.1.v.bias": torch.zeros(3, 3)}, r"\(vs.1.v.bias\) are of \(3, 3\)"),
    ],
)
def test_half_of_an_attention_is_refused(seeded, change, said):
    state = _checkpoint(seeded("test_vit", global_pool="avg")) | change
    whole = {key: tensor for key, tensor in state.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=said):
        build(Checkpoint("evo.pth", whole, None), "test_vit")
