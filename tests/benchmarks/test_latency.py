"""The benchmark end to end on a small model: peers agree, nothing is measured twice, no speeds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import pages
from benchmarks.latency import __main__ as latency
from benchmarks.latency import cases, files, tables
from benchmarks.latency.cases import BOUND, FUSED, GPU, NAIVE, NONE, PORTABLE, SLICE, TIMM, Variant
from benchmarks.latency.gpu import torch_worker
from benchmarks.latency.results import Results
from tomexport.runtime.timing import take_turns

SCHEDULE = cases.REWRITE_SCHEDULE


def _run(folder, *more):
    latency.main(
        ["--models", "test_vit", "--batches", "1", "--schedules", SCHEDULE, "--threads", "1",
         "--rounds", "6", "--seconds", "0", "--work", str(folder / "work"),
         "--out", str(folder / "out.json"), "--methods", *more]
    )  # fmt: skip
    return Results.load(folder / "out.json")


@pytest.fixture(scope="module", autouse=True)
def _shallow(seeded):
    """Let the models be two blocks deep: quick to export."""
    with pytest.MonkeyPatch.context() as patch:

        def module(name, layer_scale=False):
            return seeded(name, depth=2, **({"init_values": 1.0} if layer_scale else {}))

        patch.setattr(files, "module", module)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with results of ONNX Runtime and of the GPU that is, or is not, here."""
    folder = tmp_path_factory.mktemp("latency")
    _run(folder, "--runtimes", "onnxruntime")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return Results.load(folder / "out.json")


def _variants(results, part):
    (group,) = (group for group in results.groups if group["part"] == part)
    return {(each["form"], each["schedule"]): each for each in group["variants"]}


def test_every_form_is_timed_and_computes_what_it_should(results):
    variants = _variants(results, "schedules")
    assert "no fused kernels" in variants.pop((FUSED, SCHEDULE))["refused"]  # off in tests
    assert all(np.shape(each["us"]) == (1, 6) for each in variants.values())
    assert all(np.min(each["us"]) > 0 for each in variants.values())
    assert variants[NAIVE, SCHEDULE]["difference"] < 1e-4
    assert variants[TIMM, "none"]["difference"] < 1e-5


def test_every_rewrite_is_exact(results):
    variants = _variants(results, "rewrites")
    assert np.shape(variants[NONE, "none"]["us"]) == (cases.REWRITE_LAUNCHES, 2)  # 6, shared
    off = [variants[f"without {name}", "none"] for name in cases.REWRITES]
    assert len(off) == 6
    assert all(each["difference"] < 1e-5 for each in off)
    assert variants[SLICE, SCHEDULE]["difference"] < 1e-5  # to the bound, which cuts alike


def test_every_rewrite_changes_the_graph(folder, results):
    import onnx

    def operators(form):
        """Return each node's type, and the types of those that it reads, or the axes of weights."""
        (path,) = (folder / "work").glob(f"*_{form.replace(' ', '_')}_none.onnx")
        graph = onnx.load(path).graph
        made_by = {weight.name: len(weight.dims) for weight in graph.initializer}
        made_by |= {name: node.op_type for node in graph.node for name in node.output}
        return [(node.op_type, [made_by.get(name) for name in node.input]) for node in graph.node]

    for name in cases.REWRITES:
        twin = "all" if name == "LayerScale" else NONE
        assert operators(f"without {name}") != operators(twin), name


def test_what_is_measured_is_not_measured_again(folder, results, capsys):
    path = folder / "out.json"
    before = path.read_text()
    with pytest.raises(SystemExit):
        _run(folder)
    assert "--resume adds what it lacks" in capsys.readouterr().err
    _run(folder, "--runtimes", "onnxruntime", "--resume")
    assert "2 of 2 groups are measured already" in capsys.readouterr().out
    assert path.read_text() == before
    more = _run(folder, "--runtimes", "onnxruntime", "gpu", "--resume", "--rewrites")
    assert [group["runtime"] for group in more.groups] == ["onnxruntime", "onnxruntime", "gpu"]
    assert more.groups[:2] == results.groups


def test_every_method_has_a_row_beside_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "METHODS_MODEL", "test_vit")
    for name in ("evit", "dynamicvit"):
        monkeypatch.setitem(cases.METHODS, name, "keep:0.7@3")
    options = ["--runtimes", "onnxruntime", "--rewrites", "--methods", "evit", "dynamicvit"]
    results = _run(tmp_path, "--rewrites", *options)
    variants = _variants(results, "methods")
    bounds = {form for form, _ in variants if form.startswith("bound:")}
    assert bounds == {"bound:evit", "bound:dynamicvit"}
    assert np.shape(variants["bound:evit", "keep:0.7@3"]["us"]) == (cases.METHODS_LAUNCHES, 2)
    assert "no fused kernels" in variants["evit", "keep:0.7@3"]["refused"]  # off in tests
    page = tables.page(results, "out.json")
    (row,) = [line for line in page.splitlines() if line.startswith("| `evit` |")]
    assert row.count("×") == 2  # rounds, the bound's speed-up


def test_results_of_another_machine_are_not_added_to(folder, results, tmp_path):
    data = json.loads((folder / "out.json").read_text())
    data["machine"]["cpu"] = "another"
    (tmp_path / "out.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="another machine"):
        _run(tmp_path, "--resume")


def test_the_tables_have_a_row_for_everything(results):
    page = tables.page(results, "out.json")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{SCHEDULE}`")]
    assert row.count("×") == 5  # rounds, timm's, portable, naive, bound; there are no fused kernels
    assert all(words in page for words in cases.REWRITES.values())
    assert "fused does not run: no fused kernels here" in page


def test_speedup_and_overhead_are_of_the_right_way_round():
    samples = {(NONE, "none"): 300, (FUSED, "s"): 200, (BOUND, "s"): 160}
    variants = [{"form": f, "schedule": s, "us": [[us] * 3] * 2} for (f, s), us in samples.items()]
    group = pages.Measured({"variants": variants})
    assert group.speedup((FUSED, "s")).startswith("1.50×")
    assert group.overhead((FUSED, "s"), (BOUND, "s")).startswith("25.0%")
    assert group.speedup((PORTABLE, "s")) == "–"


@pytest.mark.parametrize("device", ["cpu"])
def test_modules_of_pytorch_take_turns_and_agree(device):
    model = cases.Model("test_vit")
    variants = cases.schedule_variants([SCHEDULE])
    group = cases.Group("schedules", model, 2, GPU, (SCHEDULE,), 6, 1, variants)
    workers = {v: torch_worker(group, v, device) for v in variants if v.form != FUSED}
    assert all(len(each) == 6 for each in take_turns(list(workers.values()), 6, 0))
    outputs = {variant: each.output() for variant, each in workers.items()}
    for one, other in (((NAIVE, SCHEDULE), (PORTABLE, SCHEDULE)), ((TIMM,), (NONE,))):
        np.testing.assert_allclose(outputs[Variant(*one)], outputs[Variant(*other)], atol=1e-5)


def test_large_models_are_split_and_the_headline_has_its_rounds():
    runtimes = [runtime for runtime in cases.RUNTIMES if runtime is not GPU]
    found = list(cases.groups(cases.MODELS, (1, 8), cases.SCHEDULES, runtimes, (), ()))
    assert len({group.key for group in found}) == len(found)
    assert {s for group in found for s in group.schedules} == set(cases.SCHEDULES)
    headline = [group for group in found if group.rounds >= 200]
    assert [group.schedules for group in headline] == [cases.HEADLINE] * 3
    assert all(group.launches >= 6 for group in headline)  # fewer hold no 95 % interval
    assert max(len(g.variants) for g in found if g.model.name == "vit_base_patch16_224") == 14


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SystemExit, match="holds other things"):
        files.fresh(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_files_of_other_sources_are_removed(tmp_path):
    assert not files.fresh(tmp_path / "work")
    (tmp_path / "work/x.onnx").touch()
    assert not files.fresh(tmp_path / "work")
    assert (tmp_path / "work/x.onnx").exists()
    (tmp_path / "work/sources.txt").write_text("older")
    assert files.fresh(tmp_path / "work")
    assert not (tmp_path / "work/x.onnx").exists()


def test_tables_stand_between_the_marks_of_the_readme(results):
    begin, end = tables.MARKS
    once = tables.with_tables(f"before\n{begin}\nstale\n{end}\nafter\n", results)
    assert tables.with_tables(once, results) == once
    assert once.startswith(f"before\n{begin}\n")
    assert once.endswith(f"{end}\nafter\n")
    assert "stale" not in once
    assert "| `test_vit` | 1 | ONNX Runtime f32 |" in once
    assert f"benchmarks/results/{tables.SOURCE.name}" in once
    with pytest.raises(SystemExit, match="lost its marks"):
        tables.with_tables("no marks", results)


def test_the_pages_are_what_the_results_give():
    readme = tables.README.read_text()
    if not tables.SOURCE.exists():
        assert all(mark in readme for mark in tables.MARKS)
        return
    results = Results.load(tables.SOURCE)
    hint = "run: python -m benchmarks.latency --tables"
    assert tables.RESULTS.read_text() == tables.page(results, tables.SOURCE.name), hint
    assert readme == tables.with_tables(readme, results), hint
