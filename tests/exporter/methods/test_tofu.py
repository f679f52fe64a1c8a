"""ToFu against its rule written by hand, and in both runtimes."""

from __future__ import annotations

import pytest
import torch

import tomexport
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block

# two implementations in float32: measured 1e-6 of the largest output
TOLERANCE = 1e-5


def _fused(tokens):
    mean = sum(tokens) / len(tokens)
    return mean * max(float(t.norm()) for t in tokens) / mean.norm()


def _rule(n_blocks, r):
    def rule(block: Block):
        x, keys = block.x, block.k.mean(0)
        unit = keys / keys.norm(dim=1, keepdim=True)
        a, b = range(2, len(x), 2), range(1, len(x), 2)
        cosines = {i: [float(unit[i] @ unit[j]) for j in b] for i in a}
        sources = sorted(a, key=lambda i: (-max(cosines[i]), i))[:r]
        host = {i: b[cosines[i].index(max(cosines[i]))] for i in sources}
        rows = []
        for i in [0, *(i for i in a if i not in sources), *b]:
            arrivals = [x[s] for s in sources if host[s] == i]
            fuses = block.index >= n_blocks / 2
            rows.append(_fused([x[i], *arrivals]) if fuses else x[i])
        return torch.stack(rows), torch.ones(len(rows))

    return rule


@pytest.mark.parametrize("depth", [4, 5])
def test_logits_equal_the_rule_by_hand(seeded, natural_images, depth):
    model = seeded("vit_tiny_patch16_224", depth=depth)
    image = torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, "const:20", method="tofu")
    with torch.no_grad():
        expected = by_hand.forward(model, image, between=_rule(depth, 20))
        found = reduced(image)
        pruned = by_hand.forward(model, image, between=_rule(99, 20))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (found - pruned).abs().max() > 1e-3, "nothing was fused"


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(seeded, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(seeded("test_vit"), "list:9,0,0,20", path, method="tofu", batch=None)
    assert report.verify.passed
    assert len(report.metadata.decisions) == 2


def test_pruned_tokens_come_back_from_their_likes(seeded):
    """SReT needs its whole grid again: a token that was dropped gets what the kept one holds."""
    reduced = tomexport.reduce(seeded("sret_t"), "exp:0.25,0", method="tofu")
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, decisions = reduced.trace(image)
    assert output.isfinite().all()
    assert all(decision.target.min() == 0 for decision in decisions)
