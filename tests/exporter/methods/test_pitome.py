"""PiToMe against its rule written by hand, and in both runtimes."""

from __future__ import annotations

import math

import pytest
import torch

import tomexport
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block
from tomexport.exporter.methods.pitome import _energy

NAME = "deit_tiny_patch16_224"
# two implementations in float32, 12 blocks: measured 2e-6 of the largest output
TOLERANCE = 1e-5


def groups(keys, r, index, n_blocks):
    """Return the tokens that become one, in the order of the slots; keys (T, D)."""
    margin = 0.75 - 0.75 * index / n_blocks
    keys = keys / keys.norm(dim=1, keepdim=True)
    cosines = (keys @ keys.T).tolist()
    excess = [[c - margin for c in row] for row in cosines]
    energy = [sum(e if e > 0 else math.exp(e) - 1 for e in row) / len(row) for row in excess]
    order = sorted(range(len(keys)), key=lambda i: (-energy[i], i))
    late = index >= math.ceil(n_blocks / 2)
    mergeable, others = (order[: 2 * r], order[2 * r :]) if late else (order, [])
    a, b = mergeable[0::2], mergeable[1::2]
    best = {i: max(b, key=lambda j: (cosines[i][j], -b.index(j))) for i in a}
    ranked = sorted(a, key=lambda i: (-cosines[i][best[i]], a.index(i)))
    sources, kept = ranked[:r], ranked[r:]
    return [[i, *(s for s in sources if best[s] == i)] for i in [*others, *kept, *b]]


def _rule(n_blocks, removed):
    def rule(block: Block):
        found = groups(block.k.mean(0)[1:], removed[block.index], block.index, n_blocks)
        x, sizes = block.x[1:], block.sizes[1:]
        rows = [(x[g] * sizes[g][:, None]).sum(0) / sizes[g].sum() for g in found]
        left = torch.stack([block.sizes[0], *(sizes[g].sum() for g in found)])
        return torch.stack([block.x[0], *rows]), left

    return rule


@pytest.mark.parametrize("schedule", ["keep:0.925", "const:13", "keep:0.7@1,7"])
def test_logits_equal_the_rule_by_hand(seeded, natural_images, schedule):
    model, image = seeded(NAME), torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, schedule, method="pitome")
    removed = [step.removed for step in reduced.plan.steps]
    by_energy = _rule(12, removed)

    def rule(block: Block):
        return by_energy(block) if removed[block.index] else (block.x, block.sizes)

    with torch.no_grad():
        expected = by_hand.forward(model, image, between=rule)
        found = reduced(image)
        assert (found - tomexport.reduce(model, schedule)(image)).abs().max() > 1e-3
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_share_rounds_what_is_removed_down():
    plan = tomexport.plan("deit_small_patch16_224", "keep:0.925", method="pitome")
    expected, n = [], 196
    for _ in range(12):
        n -= math.floor(n - n * 0.925)
        expected.append(n + 1)
    assert [step.tokens_out for step in plan.steps] == expected
    assert [step.removed for step in plan.steps[:2]] == [14, 13]


def test_energy_of_a_token_alone_is_lowest():
    metric = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]])
    energy = _energy(metric, 0.5)[0].tolist()
    alone = (2 * (math.exp(-0.5) - 1) + 0.5) / 3
    alike = (1.0 + math.exp(-0.5) - 1) / 3
    assert energy == pytest.approx([alike, alike, alone])


def test_attention_is_not_weighted_by_size(seeded, natural_images):
    model, image = seeded("test_vit"), torch.from_numpy(natural_images(160)[:1])
    with_bias, without = (
        tomexport.reduce(model, "const:9", method="pitome", prop_attn=prop_attn)
        for prop_attn in (True, False)
    )
    with torch.no_grad():
        assert torch.equal(with_bias(image), without(image))


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(seeded, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(seeded("test_vit"), "keep:0.9@1,4", path, method="pitome", batch=None)
    assert report.verify.passed
    assert len(report.metadata.decisions) == 2
