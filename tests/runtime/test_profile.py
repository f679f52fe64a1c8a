"""`profile`: what is measured, what is refused, and what may be said of it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import tomexport
from tests.made_up_profile import report as made_up
from tomexport.cli import main
from tomexport.errors import ArtifactError, BackendError
from tomexport.kernels import build
from tomexport.runtime import profile as profiling
from tomexport.runtime import timing
from tomexport.runtime.profile import percent, times, verdict
from tomexport.runtime.timing import Interval

QUICK = {"rounds": 6, "launches": 1, "seconds": 0, "threads": 1}


@pytest.fixture(scope="module")
def report(files, kernel_cache):
    """Give a profile in everything that is here; nobody's speed is judged by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TOMEXPORT_KERNELS")
        patch.setenv("TOMEXPORT_CACHE", str(kernel_cache))
        return tomexport.profile(files / "model.onnx", **QUICK | {"launches": 2})


# ---- what is measured


def test_every_runtime_and_precision_has_a_run(report):
    runs = [(run.backend, run.precision) for run in report.runs]
    assert runs[:2] == [("onnxruntime", "f32"), ("openvino", "f32")]
    assert len(runs) == len(set(runs))
    assert {
        (run.device, run.batch, run.threads, run.rounds, run.launches) for run in report.runs
    } == {("CPU", 1, 1, 6, 2)}
    assert (report.model, report.schedule, report.merges) == ("test_vit", "const:8", 5)


def test_every_form_and_baseline_is_a_variant(report, files):
    forms = ["fused", "portable"] if all(build.tools().values()) else ["portable"]
    for run in report.runs:
        assert [each.name for each in run.variants] == [*forms, "none", "bound"]
        paths = {each.name: each.path for each in run.variants}
        assert paths["portable"] == str(files / "model.onnx")
        assert paths["bound"] == str(files / "model.bound.onnx")


def test_figures_are_those_of_the_samples(report):
    for run in report.runs:
        samples = {each.name: each.samples_ms for each in run.variants}
        per_round = {
            name: np.array([np.median(turn) for turn in turns]) for name, turns in samples.items()
        }
        for each in run.variants:
            calls = np.concatenate(samples[each.name])
            assert each.calls == len(calls) >= 6
            assert each.median_ms == pytest.approx(np.median(calls), abs=1e-3)
            assert each.min_ms <= each.p20_ms <= each.median_ms <= each.p90_ms <= each.p99_ms
            assert each.spread == pytest.approx(
                (each.p90_ms - each.p20_ms) / each.median_ms, abs=1e-3
            )
            assert 2**24 < each.peak_memory < 2**34
        merged, none, bound = (per_round[name] for name in ("portable", "none", "bound"))
        found = next(each for each in run.variants if each.name == "portable")
        assert found.speedup.value == pytest.approx(np.median(none / merged), rel=1e-3)
        assert found.overhead.value == pytest.approx(np.median(merged / bound) - 1, abs=1e-3)
        assert found.us_per_merge.value == pytest.approx(
            np.median(merged - bound) * 1000 / report.merges, abs=0.1
        )
        assert found.share_of_bound.value == pytest.approx(np.median(bound / merged), rel=1e-3)
        for interval in (found.speedup, found.overhead, found.us_per_merge):
            assert interval.low <= interval.value <= interval.high


def test_baselines_are_not_compared_with_themselves(report):
    for run in report.runs:
        none, bound = run.variants[-2:]
        assert (none.speedup, none.overhead, none.operators) == (None, None, ())
        assert bound.speedup is not None
        assert (bound.overhead, bound.us_per_merge, bound.share_of_bound) == (None, None, None)


def test_operators_tell_merging_from_the_network(report):
    for run in report.runs:
        for each in run.variants[:-2]:
            merging = [op for op in each.operators if op.merging]
            network = [op for op in each.operators if not op.merging]
            assert sum(op.microseconds for op in network) > 0
            if each.name == "fused":
                assert merging[0].count == report.merges
            else:
                # OpenVINO says that what took no microsecond was not run
                least = 8 if run.backend == "onnxruntime" else 3
                assert sum(op.count for op in merging) >= least * report.merges
            products = sum(op.count for op in network if op.type in ("MatMul", "FullyConnected"))
            assert products >= 24  # qkv, projection and two of the MLP, in six blocks


def test_it_predicts_by_what_the_files_compute(report, files):
    plans = [
        tomexport.pipeline.describe(files / f"model{name}.onnx").plan for name in (".none", "")
    ]
    none, merged = (plan.macs - plan.macs_spared for plan in plans)
    assert report.runs[0].predicted_speedup == pytest.approx(none / merged, abs=1e-4)


def test_the_report_is_plain_json_with_machine_and_versions(report):
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["passed"] is True
    assert {"cpu", "cores", "core_kinds", "flags", "governor", "mhz"} <= set(data["machine"])
    assert {"tomexport", "python", "onnxruntime", "openvino"} <= set(data["versions"])
    assert {"low", "value", "high"} == set(data["runs"][0]["variants"][0]["speedup"])
    assert len(data["runs"][0]["variants"][0]["samples_ms"]) == 6


def test_a_portable_file_alone(files):
    found = tomexport.profile(files / "model.xml", precisions=["f32"], operators=False, **QUICK)
    (run,) = found.runs
    assert [each.name for each in run.variants] == ["portable"]
    assert (run.speedup, run.variants[0].operators) == (None, ())
    assert "cannot be said without the unmerged model" in run.verdict
    assert "cannot be said without the free-merge bound" in run.verdict
    assert "no model.none.xml beside the file" in found.notes[0]
    assert "no model.bound.xml beside the file" in found.notes[1]
    assert "--with-baselines" in found.notes[2]


def test_a_file_that_merges_nothing(files):
    found = tomexport.profile(files / "model.none.onnx", backends=["onnxruntime"], **QUICK)
    (run,) = found.runs
    assert [each.name for each in run.variants] == ["none"]
    assert run.verdict == "The file merges no tokens, so there is nothing to judge."
    assert "merges no tokens" in found.notes[0]


def test_batches_of_a_dynamic_file(seeded, tmp_path):
    path = tmp_path / "model.onnx"
    tomexport.export(seeded("test_vit"), "const:8", path, batch=None, verify=False)
    found = tomexport.profile(
        path, backends=["onnxruntime"], batches=[1, 3], kernels="off", operators=False, **QUICK
    )
    assert [run.batch for run in found.runs] == [1, 3]


def test_a_system_that_cannot_stop_or_pin_says_so_and_goes_on(files, monkeypatch):
    for module in (timing, profiling):
        monkeypatch.setattr(module, "CAN_STOP", False)
        monkeypatch.setattr(module, "CAN_PIN", False)
    found = tomexport.profile(
        files / "model.none.onnx", backends=["onnxruntime"], operators=False, **QUICK
    )
    assert found.runs[0].cpus == ()
    assert any("cannot stop the processes that wait" in note for note in found.notes)
    assert any("cannot keep a process on certain CPUs" in note for note in found.notes)


def test_a_device_that_one_runtime_has_leaves_the_other_out(files, monkeypatch):
    backend = profiling.choose(files / "model.onnx", "openvino")[0]
    monkeypatch.setattr(type(backend), "devices", lambda self: {"GPU": ("f32",)})
    chosen, notes = profiling._runtimes(files / "model.onnx", None, "CPU", None)
    assert [each.name for each in chosen] == ["onnxruntime"]
    assert "openvino has no device 'CPU' here; it has GPU" in notes[0]


# ---- what is refused, before anything is timed


REFUSALS = {
    "too few rounds": ({"rounds": 5}, "5 rounds are too few for a 95 % interval"),
    "no launch": ({"launches": 0}, "0 launches cannot share 6 rounds; each needs one"),
    "more launches than rounds": ({"launches": 7}, "7 launches cannot share 6 rounds"),
    "negative seconds": ({"seconds": -1}, "-1 seconds is no length of time"),
    "endless": ({"seconds": float("inf")}, "is no length of time"),
    "no threads": ({"threads": 0}, "0 threads cannot be timed: this process may use"),
    "too many threads": ({"threads": 4096}, "4096 threads cannot be timed"),
    "no such device": ({"device": "TPU"}, "onnxruntime has no device 'TPU' here; it has CPU.*"
                                          "openvino has no device 'TPU' here; it has CPU"),
    "device of the other": ({"backends": ["openvino"], "device": "CUDA"}, "no device 'CUDA' here"),
    "no such precision": ({"precisions": ["f8"]}, "cannot compute in 'f8' here"),
    "fixed batch": ({"batches": [2]}, "A batch of 2 does not fit: model.onnx takes batches of 1"),
    "speed-up of nothing": ({"min_speedup": float("nan")}, "speed-up of nan cannot be required"),
    "no such library": ({"kernels": "gone.so", "backends": ["onnxruntime"]}, "no library gone.so"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_refused(files, case):
    options, message = REFUSALS[case]
    with pytest.raises(BackendError, match=message):
        tomexport.profile(files / "model.onnx", **{"seconds": 0, "rounds": 6} | options)


def test_a_speedup_cannot_be_required_without_a_baseline(files):
    with pytest.raises(ArtifactError, match=r"--min-speedup cannot judge .*no unmerged baseline"):
        tomexport.profile(files / "model.xml", min_speedup=1.1)
    with pytest.raises(ArtifactError, match=r"--min-speedup cannot judge .*merges no tokens"):
        tomexport.profile(files / "model.none.onnx", min_speedup=1.1)


def test_a_speedup_that_is_required():
    assert made_up(min_speedup=None).passed
    assert made_up(min_speedup=1.25).passed
    assert not made_up(min_speedup=1.26).passed
    assert made_up(min_speedup=1.26).failures == made_up().runs


# ---- the command


QUICK_COMMAND = ["--backend", "onnxruntime", "--kernels", "off", "--no-operators", "--rounds", "6",
                 "--launches", "1", "--seconds", "0", "--threads", "1"]  # fmt: skip


def test_a_check_that_fails_shows_what_it_found(files, tmp_path, capsys):
    png = tmp_path / "chart.png"
    code = main(["profile", str(files / "model.onnx"), *QUICK_COMMAND, "--min-speedup", "1000",
                 "--png", str(png), "--json"])  # fmt: skip
    assert code == 1
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is False
    assert [each["name"] for each in data["runs"][0]["variants"]] == ["portable", "none", "bound"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_check_that_passes(files, capsys):
    code = main(["profile", str(files / "model.onnx"), *QUICK_COMMAND, "--min-speedup", "0.001"])
    assert code == 0
    assert "portable" in capsys.readouterr().out


def test_a_check_that_cannot_be_made(files, tmp_path, capsys):
    shutil.copy(files / "model.onnx", tmp_path / "alone.onnx")
    code = main(["profile", str(tmp_path / "alone.onnx"), *QUICK_COMMAND, "--min-speedup", "1.1"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "there is no alone.none.onnx beside the file" in err


def test_a_chart_that_cannot_be_is_refused_before_anything_is_timed(files, tmp_path, capsys):
    (tmp_path / "old.png").write_text("precious")
    for name, words in (("chart.svg", "not '.svg'"), ("old.png", "--force replaces it"),
                        ("gone/chart.png", "no folder")):  # fmt: skip
        code = main(["profile", str(files / "model.onnx"), "--seconds", "900", "--png",
                     str(tmp_path / name)])  # fmt: skip
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert words in err
    assert (tmp_path / "old.png").read_text() == "precious"


# ---- what may be said


FASTER, MUCH, SLOWER = Interval(1.2, 1.15, 1.25), Interval(1.5, 1.4, 1.6), Interval(0.9, 0.85, 0.95)
UNCLEAR = Interval(1.02, 0.98, 1.05)
COSTS, FREE, LESS = (
    Interval(0.05, 0.04, 0.06),
    Interval(0.01, -0.01, 0.02),
    Interval(-0.03, -0.04, -0.02),
)
PAYS = {
    "less than predicted": (1.36, FASTER, "pays, but less than predicted: 1.20× (1.15–1.25) of"),
    "as predicted": (1.22, FASTER, "pays as predicted: 1.20× (1.15–1.25), which includes"),
    "at the upper end": (1.25, FASTER, "pays as predicted"),
    "more than predicted": (1.1, FASTER, "pays, and more than predicted"),
    "unclear": (1.36, UNCLEAR, "as far as can be told: 1.02× (0.98–1.05), not the 1.36×"),
    "just at one": (1.36, Interval(1.1, 1.0, 1.2), "does not pay, as far as can be told"),
    "slower": (1.36, SLOWER, "does not pay: the file is slower than unmerged, 0.90× (0.85–0.95)"),
    "no baseline": (1.36, None, "Whether merging pays cannot be said without the unmerged model."),
}  # fmt: skip
COST = {
    "costs": (COSTS, FASTER, "costs 5.0% (4.0–6.0) over the bound; free merging would give 1.20×"),
    "free": (FREE, MUCH, "costs nothing that can be told from noise, 1.0% (-1.0–2.0); free"),
    "faster than free": (LESS, MUCH, "than its free-merge bound, -3.0% (-4.0–-2.0): no bound"),
    "no hope": (COSTS, SLOWER, "even free merging would be slower than none: 0.90× (0.85–0.95)"),
    "hardly any": (COSTS, UNCLEAR, "even free merging would not pay that one could tell"),
    "bound alone": (COSTS, None, "Merging itself costs 5.0% (4.0–6.0) over the bound."),
    "no bound": (None, None, "What merging itself costs cannot be said without the free-merge"),
}  # fmt: skip


@pytest.mark.parametrize("case", PAYS)
def test_whether_it_pays_in_words(case):
    predicted, speedup, words = PAYS[case]
    assert words in verdict(predicted, speedup, None, None)


@pytest.mark.parametrize("case", COST)
def test_what_it_costs_in_words(case):
    overhead, bound, words = COST[case]
    assert words in verdict(1.36, FASTER, overhead, bound)


def test_figures_in_words():
    assert times(FASTER) == "1.20× (1.15–1.25)"
    assert percent(COSTS) == "5.0% (4.0–6.0)"
