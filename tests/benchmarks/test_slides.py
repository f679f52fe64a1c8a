"""The slides' tables and curves from made-up samples, a small real run, and a recursive ViT."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch

import tomexport
from benchmarks.latency import files
from benchmarks.latency.cases import BOUND, FUSED, NONE, Model
from benchmarks.latency.results import Results
from benchmarks.pages import README
from benchmarks.slides import __main__ as slides
from benchmarks.slides import cases, charts, tables
from benchmarks.slides.recursive import NAME, recursive

_ENGINE = {"onnxruntime": "f32", "openvino": "f32", "openvino-default": "bf16"}


def _record(group):
    """Make up a record: twice the share of FLOPs that is left in ms, the bound a tenth less."""
    schedules = ("none", *group.schedules)
    costs = {s: {"macs": 10**9, "flops_slides": 2 * 10**9, "removed": 0} for s in schedules}
    costs["exp:0.25,0"] = {"macs": 8 * 10**8, "flops_slides": 10**9, "removed": 264}
    us = {NONE: 2000, FUSED: 1000, BOUND: 900}
    memory = {NONE: (300, 100), FUSED: (240, 40), BOUND: (240, 40)}
    return {
        "part": group.part, "model": group.model.name, "batch": group.batch,
        "runtime": group.runtime.name, "schedules": list(group.schedules),
        "engine": group.runtime.backend, "device": "CPU", "threads": 2, "launches": 2,
        "precision": _ENGINE[group.runtime.name], "rounds": 6, "costs": costs,
        "variants": [
            {"form": v.form, "schedule": v.schedule, "us": [[us[v.form]] * 3] * 2,
             "peak_mib": memory[v.form][0], "call_mib": memory[v.form][1]}
            for v in group.variants
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def groups():
    return list(cases.groups(cases.MODELS, cases.BATCHES, cases.SCHEDULES, cases.RUNTIMES))


@pytest.fixture(scope="module")
def results(groups):
    return Results({"cpu": "a CPU"}, {}, [_record(group) for group in groups])


def _rows(page, first):
    return [line for line in page.splitlines() if line.startswith(f"| {first}")]


def test_everything_that_the_slides_show_is_measured(groups):
    assert len({group.key for group in groups}) == len(groups)
    timed = {(g.model.name, g.batch, g.runtime.name): g for g in groups if g.part == "schedules"}
    assert len(timed) == 3 * 3 * 3
    assert timed["sret_t", 32, "openvino-default"].schedules == tuple(cases.PUBLISHED)
    bounds = [v for g in groups for v in g.variants if v.form == BOUND]
    assert len(bounds) == 2 * 3  # two schedules of SReT-T, batch 1
    assert all(g.rounds >= {1: 60, 8: 18, 32: 12}[b] for (_, b, _), g in timed.items())
    sweep = [g for g in groups if g.part == "sweep"]
    assert [g.runtime.precision for g in sweep] == ["f32", "f32"]
    assert {"exp:0.10,0.6", "exp:0.25,0", "exp:0.40,0.2"} < set(sweep[0].schedules)


def test_flops_and_totals_are_those_that_the_slides_published():
    model = Model(cases.SRET)
    group = next(cases.groups([model], [1], cases.SCHEDULES, cases.RUNTIMES, ["schedules"]))
    costs = slides.costs(group)["costs"]
    assert round(costs["none"]["flops_slides"] / 1e9, 2) == cases.BASELINE.gflops
    for schedule, said in cases.PUBLISHED.items():
        assert costs[schedule]["flops_slides"] / 1e9 == pytest.approx(said.gflops, abs=0.006)
    assert costs["exp:0.25,0"]["removed"] == 264
    assert costs["none"]["removed"] == 0


def test_each_figure_has_its_ratio_beside_the_slides(results):
    page = tables.page(results, "slides.json")
    (cost, *_) = _rows(page, "`exp:0.25,0` | 264")
    assert "1.000 | 0.50 | 0.800 | 0.80 | 75.95 | 1.49 | 0.78 | 0.62 | 1.276" in cost
    rows = _rows(page, "`exp:0.25,0` | OpenVINO f32 | 2 × 3")
    (own,) = [row for row in rows if "| 32000.0 |" in row and "1.276" in row]  # batch 32, SReT-T
    assert "2.00× (2.00–2.00) | 1.276 | 240 | 0.80 | 40 | 0.40 | 0.62 |" in own
    (deit, recursive) = [row for row in rows if "32000.0" in row and "1.276" not in row]
    assert deit.count("–") == 3  # the slides say nothing of other models: speed, memory, interval
    assert deit == recursive
    base = _rows(page, "`none` | OpenVINO bf16, its own choice | 2 × 3 | 500.0")[0]
    assert "| 1 | 1 | 300 | 1.00 | 100 | 1.00 | 1.00 |" in base


def test_overhead_is_over_the_bound(results):
    text = tables.short(results)
    row = [line for line in _rows(text, "`const:10` | ONNX Runtime f32") if "%" in line]
    assert row == ["| `const:10` | ONNX Runtime f32 | 2 × 3 | 2.00× (2.00–2.00) | "
                   "2.22× (2.22–2.22) | 11.1% (11.1–11.1) |"]  # fmt: skip


def test_the_readme_shows_two_batches_every_model_and_the_pictures(results):
    begin, end = tables.MARKS
    once = tables.with_tables(f"before\n{begin}\nstale\n{end}\nafter\n", results)
    assert tables.with_tables(once, results) == once
    assert "stale" not in once
    assert "batch 1:" in once
    assert "batch 32:" in once
    assert len(_rows(once, f"`{NAME}` | 1 | ")) == 2
    assert f"](docs/{charts.ALPHA})" in once
    assert f"](docs/{charts.PARETO})" in once


def test_what_could_not_run_leaves_a_dash_and_its_reason(results):
    record = _record(next(cases.groups([Model("x")], [1], ["const:9"], cases.RUNTIMES)))
    record["variants"][1] = {"form": FUSED, "schedule": "const:9", "refused": "no kernels"}
    left_out = {"part": "schedules", "model": "x", "batch": 1, "runtime": "openvino-default",
                "schedules": [], "left_out": "f32 is its own"}  # fmt: skip
    page = tables.page(Results({"cpu": "a CPU"}, {}, [record, left_out]), "slides.json")
    assert "| `const:9` | ONNX Runtime f32 | 2 × 3 | – | – | – | – | – | – | – | – |" in page
    assert "- onnxruntime: no kernels" in page.replace("ONNX Runtime f32", "onnxruntime")
    assert "- openvino-default: f32 is its own" in page


def test_the_curves_are_small_pictures(results, tmp_path):
    charts.write(results, tmp_path)
    for name in (charts.ALPHA, charts.PARETO):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 200_000
    assert len(list(tmp_path.iterdir())) == 2
    assert not charts.drawable(Results({}, {}))


def test_a_quick_run_measures_and_prints(seeded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        files, "module", lambda name, layer_scale=False: seeded("test_vit", depth=2)
    )
    slides.main(
        ["--quick", "--models", "test_vit", "--runtimes", "onnxruntime", "--threads", "1",
         "--seconds", "0", "--work", str(tmp_path / "work")]
    )  # fmt: skip
    (group,) = Results.load(tmp_path / "work/quick.json").groups
    assert group["rounds"] == 6
    none = group["variants"][0]
    assert 0 <= none["call_mib"] < none["peak_mib"]
    assert "`exp:0.25,0`" in capsys.readouterr().out


def test_pages_are_what_the_results_give():
    readme = README.read_text()
    if not tables.SOURCE.exists():
        assert all(mark in readme for mark in tables.MARKS)
        return
    results = Results.load(tables.SOURCE)
    hint = "run: python -m benchmarks.slides --tables"
    assert tables.PAGE.read_text() == tables.page(results, tables.SOURCE.name), hint
    assert readme == tables.with_tables(readme, results), hint


# ---- blocks that are called more than once


@pytest.fixture(scope="module")
def shared(seeded):
    """Two blocks, each called twice, with LayerScale."""
    return recursive(copy.deepcopy(seeded("test_vit", init_values=1.0, depth=4)), 2, 2)


def _bytes(path):
    return sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)


@pytest.mark.parametrize("schedule", ["none", "const:8"])
def test_a_recursive_vit_is_exported_with_its_weights_stored_once(shared, tmp_path, schedule):
    report = tomexport.export(shared, schedule, tmp_path / "r.onnx")
    assert report.verify.passed  # in both runtimes
    assert report.metadata.plan.removed_total == (0 if schedule == "none" else 32)
    n_bytes = 4 * sum(parameter.numel() for parameter in shared.parameters())
    assert _bytes(tmp_path / "r.onnx") < 1.01 * n_bytes


def test_a_recursive_vit_is_built_by_name_and_reduces_to_itself():
    model = files.module(NAME)
    plain = files.module("deit_tiny_distilled_patch16_224")
    assert len({id(block) for block in model.blocks}) == 4
    count = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
    assert count == [2_351_888, 5_910_800]
    plans = [tomexport.plan(m, "const:10") for m in (model, plain)]
    assert [plan.macs for plan in plans] == [plans[0].macs] * 2
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image)
        assert (tomexport.reduce(model, "none")(image) - expected).abs().max() < 1e-5
