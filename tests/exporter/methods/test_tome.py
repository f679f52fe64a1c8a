"""ToMe's options against their rules written by hand, and in both runtimes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tomexport
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block
from tomexport.errors import RewriteError, UnknownNameError

# two implementations in float32, 3 blocks: measured 1e-6 of the largest output
TOLERANCE = 1e-5
VALUES = {
    "metric": ["q", "v", "x-before", "x-after"],
    "similarity": ["euclidean", "dot", "softmax"],
    "combine": ["mean", "max", "keep"],
    "partition": ["sequential", "random"],
}
SINGLE = [{option: value} for option, values in VALUES.items() for value in values]


def _named(options):
    return "tome:" + ",".join(f"{key}={value}" for key, value in options.items())


def _signal(block: Block, metric):
    if metric == "x-before":
        return block.given
    return block.x if metric == "x-after" else getattr(block, metric).mean(0)


def _alike(a, rows, similarity):
    """How like a token is to each of some others."""
    if similarity == "cosine":
        return [float(a @ b / (a.norm() * b.norm())) for b in rows]
    if similarity == "euclidean":
        return [-float((a - b).norm()) for b in rows]
    dots = [float(a @ b) for b in rows]
    if similarity == "dot":
        return dots
    powers = np.exp(np.array(dots) / len(a) ** 0.5)
    return (powers / powers.sum()).tolist()


def _sets(n, partition):
    a, b = [i for i in range(2, n, 2)], [i for i in range(1, n, 2)]
    if partition == "alternating":
        return a, b
    order = list(range(1, n))
    if partition == "random":
        order = np.random.default_rng(n).permutation(order).tolist()
    return sorted(order[: len(a)]), sorted(order[len(a) :])


def _combined(group, x, sizes, combine):
    """Make one token of a group, whose first goes nowhere."""
    if combine == "keep":
        return x[group[0]]
    if combine == "max":
        return torch.stack([x[i] for i in group]).max(0).values
    weights = [sizes[i] if combine == "weighted" else 1.0 for i in group]
    return sum(w * x[i] for w, i in zip(weights, group, strict=True)) / sum(weights)


def _rule(r, metric="k", similarity="cosine", combine="weighted", partition="alternating"):
    def rule(block: Block):
        x, sizes = block.x, block.sizes.tolist()
        signal = _signal(block, metric)
        a, b = _sets(len(x), partition)
        scores = {i: _alike(signal[i], signal[b], similarity) for i in a}
        sources = sorted(a, key=lambda i: (-max(scores[i]), i))[:r]
        host = {i: b[scores[i].index(max(scores[i]))] for i in sources}
        groups = [
            [i, *(s for s in sources if host[s] == i)]
            for i in [0, *(i for i in a if i not in sources), *b]
        ]
        rows = [_combined(group, x, sizes, combine) for group in groups]
        return torch.stack(rows), torch.tensor([sum(sizes[i] for i in g) for g in groups])

    return rule


@pytest.mark.parametrize(
    "options",
    [*SINGLE, {"metric": "q", "similarity": "dot", "combine": "max", "partition": "sequential"}],
    ids=_named,
)
def test_logits_equal_the_rule_by_hand(seeded, natural_images, options):
    model = seeded("vit_tiny_patch16_224", depth=3)
    image = torch.from_numpy(natural_images(224)[:1])
    reduced = tomexport.reduce(model, "const:16", method=_named(options))
    with torch.no_grad():
        expected = by_hand.forward(model, image, between=_rule(16, **options), biased=True)
        found = reduced(image)
        assert (found - tomexport.reduce(model, "const:16")(image)).abs().max() > 1e-3, "no effect"
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_defaults_are_the_fused_operator():
    said = "tome:metric=k,similarity=cosine,combine=weighted,partition=alternating"
    plan = tomexport.plan("test_vit", "const:8", method=said)
    assert plan.method == "tome"


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        ({"metric": "x-before"}, ".onnx"),
        ({"metric": "v", "similarity": "dot", "combine": "mean"}, ".onnx"),
        ({"similarity": "euclidean", "combine": "keep", "partition": "sequential"}, ".onnx"),
        ({"similarity": "softmax", "combine": "max", "partition": "random"}, ".onnx"),
        ({"similarity": "softmax", "combine": "max", "partition": "random"}, ".xml"),
    ],
    ids=str,
)
def test_files_are_proven(seeded, tmp_path, options, suffix):
    path = tmp_path / f"model{suffix}"
    report = tomexport.export(
        seeded("test_vit"), "list:20,9", path, method=_named(options), batch=None
    )
    assert report.verify.passed
    assert len(report.metadata.decisions) == report.metadata.plan.n_reductions == 2


def test_sret_takes_what_it_gives(seeded):
    model = seeded("sret_t")
    with pytest.raises(RewriteError, match="needs queries"):
        tomexport.reduce(model, "exp:0.25,0", method="tome:metric=q")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("tome:metric=keys", "Unknown metric of tome 'keys'"),
        ("tome:greedy=yes", "Unknown option of tome 'greedy'"),
        ("dtem:metric=q", "Unknown option of dtem 'metric'"),
    ],
)
def test_refuses(method, message):
    with pytest.raises(UnknownNameError, match=message):
        tomexport.plan("test_vit", "const:8", method=method)
