"""DiffRate against its rule written by hand, its files of counts, and in both runtimes."""

from __future__ import annotations

import json

import pytest
import torch

import tomexport
from tests.exporter.methods import by_hand
from tests.exporter.methods.by_hand import Block
from tomexport.errors import PlanError, RewriteError
from tomexport.plan import Schedule

NAME = "deit_tiny_patch16_224"
# two implementations in float32, 12 blocks: measured 2e-6 of the largest output
TOLERANCE = 1e-5
# nothing at first; only pruned; only merged; both; counts above what is left
PRUNED = [197, 190, 190, 170, 164, 150, 140, 160, 100, 80, 60, 3]
MERGED = [197, 190, 180, 160, 148, 150, 130, 156, 90, 70, 60, 3]


def _rule(block: Block):
    x, sizes = block.x, block.sizes
    scores = block.attention[:, 0].mean(0).tolist()
    order = [0, *sorted(range(1, len(x)), key=lambda i: (-scores[i], i))]
    order = order[: PRUNED[block.index]]
    n_left = min(MERGED[block.index], len(order))
    unit = x / x.norm(dim=1, keepdim=True)
    groups, shares = [[i] for i in order[:n_left]], [float(sizes[i]) for i in order[:n_left]]
    for i in order[n_left:]:
        cosines = [float(unit[i] @ unit[j]) for j in order[1:n_left]]
        host = 1 + cosines.index(max(cosines))
        groups[host].append(i)
        shares[host] += float(sizes[i]) * max(cosines)
    return torch.stack([x[g].mean(0) for g in groups]), torch.tensor(shares)


@pytest.fixture
def file(tmp_path):
    def save(content):
        path = tmp_path / "compression_rate.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return save


def test_logits_equal_the_rule_by_hand(seeded, natural_images, file):
    model, image = seeded(NAME), torch.from_numpy(natural_images(224)[:1])
    path = file({"prune_kept_num": PRUNED, "merge_kept_num": MERGED})
    reduced = tomexport.reduce(model, f"diffrate:{path}", method="diffrate")
    counts = [step.tokens_out for step in reduced.plan.steps]
    assert counts == [197, 190, 180, 160, 148, 148, 130, 130, 90, 70, 60, 3]
    assert [s.pruned for s in reduced.plan.steps] == [0, 7, 0, 10, 0, 0, 8, 0, 30, 10, 10, 57]
    with torch.no_grad():
        expected = by_hand.forward(model, image, between=_rule, biased=True)
        found = reduced(image)
        assert (found - model(image)).abs().max() > 1e-3, "nothing was removed"
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_official_form_is_read_and_the_schedule_says_all(file):
    lists = [f"[{','.join(map(str, counts))}]" for counts in (PRUNED, MERGED)]
    entry = dict(zip(("prune_kept_num", "merge_kept_num"), lists, strict=True))
    path = file({"ViT-T-DeiT": {"1.0": entry}})
    schedule = Schedule.parse(f"diffrate:{path}@ViT-T-DeiT/1.0")
    assert schedule.text == f"diffrate:{lists[0][1:-1]}/{lists[1][1:-1]}"
    assert Schedule.parse(schedule.text) == schedule
    assert schedule == Schedule.parse(f"diffrate:{file(entry)}")


def test_other_schedules_merge_and_other_methods_take_the_counts(seeded):
    text = f"diffrate:{','.join(map(str, PRUNED))}/{','.join(map(str, MERGED))}"
    counts = [step.tokens_out for step in tomexport.plan(NAME, text, method="diffrate").steps]
    assert [s.tokens_out for s in tomexport.plan(NAME, text, method="topk").steps] == counts
    steps = tomexport.plan(NAME, "const:13", method="diffrate").steps
    assert [(step.removed, step.pruned) for step in steps] == [(13, 0)] * 12


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_are_proven(seeded, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    counts = "101,95,80,80,70,60/101,90,80,75,70,60"  # both, pruned, merged, pruned
    report = tomexport.export(
        seeded("test_vit"), f"diffrate:{counts}", path, method="diffrate", batch=None
    )
    assert report.verify.passed
    assert report.metadata.plan.schedule == f"diffrate:{counts}"
    assert len(report.metadata.decisions) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "it holds no JSON"),
        ([197, 196], "merge_kept_num are not there; there is nothing of that name"),
        ({"ViT-T-DeiT": {}}, "are not there; there is ViT-T-DeiT"),
        ({"prune_kept_num": "None", "merge_kept_num": [1]}, "number 1 of prune_kept_num is 'None'"),
        ({"prune_kept_num": [9, 8], "merge_kept_num": "[9]"}, "has 2 counts after pruning and 1"),
        ({"prune_kept_num": [9.5], "merge_kept_num": [9]}, "is '9.5'"),
    ],
)
def test_malformed_files_are_refused(file, content, message):
    with pytest.raises(PlanError, match=message):
        Schedule.parse(f"diffrate:{file(content)}")


@pytest.mark.parametrize("name", ["", "nowhere.json", ".", "nowhere.json@ViT/1.0"])
def test_files_that_cannot_be_read_are_refused(name):
    with pytest.raises(PlanError, match=r"cannot be read .*Give DiffRate's JSON file"):
        Schedule.parse(f"diffrate:{name}")


def test_lists_of_another_model_are_refused():
    with pytest.raises(PlanError, match="has counts for 2 blocks, but the model has 12"):
        tomexport.plan(NAME, "diffrate:197,196/197,195", method="diffrate")


def test_a_model_without_class_token_is_refused(seeded):
    with pytest.raises(RewriteError, match="what the class token attends to"):
        tomexport.reduce(seeded("vit_base_patch16_siglip_224"), "const:8", method="diffrate")
