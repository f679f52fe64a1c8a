"""`search`, whole, on digits: what is measured, what is chosen, what is kept and what refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

import tomexport
from tomexport import pipeline
from tomexport.calib.images import ImageSet
from tomexport.calib.search.measure import Meter, halves, prepare
from tomexport.cli import main
from tomexport.errors import ArtifactError, BackendError, ImageError, PlanError
from tomexport.runtime.timing import Interval

SMALL = {"families": ["none", "const"], "backend": "onnxruntime", "seconds": 0.0}


@pytest.fixture
def by_macs(monkeypatch):
    """Let MACs say how long a file takes, and count the files that are timed."""
    timed = []

    def ratio(meter, job):
        plan = pipeline.describe(Path(job.path)).plan
        timed.append(plan.schedule)
        share = plan.macs / plan.macs_unreduced
        return Interval(share, share, share)

    monkeypatch.setattr(Meter, "_time", ratio)
    monkeypatch.setattr(Meter, "unmerged_ms", lambda meter: 10.0)
    return timed


@pytest.fixture
def images(digits):
    return ImageSet.find(digits.held_out, limit=60)


def test_a_small_space_is_searched_whole(digits, images, by_macs, tmp_path):
    journal, out = str(tmp_path / "s.journal"), tmp_path / "best.onnx"
    most = pipeline.plan(digits.checkpoint, "const:11").macs / 1e9
    limits = {"max_gmac": most + 1e-4, "trials": 100, "storage": journal}
    report = tomexport.search(digits.checkpoint, images, out, max_drop=0.3, **limits, **SMALL)
    assert sorted(by_macs) == sorted(["none", *(f"const:{r}" for r in range(11, 14))])
    assert "every point of the space was tried" in report.notes
    points = report.points
    assert [point.ratio.value for point in points] == sorted(p.ratio.value for p in points)
    for point, best in zip(points, report.front, strict=True):
        faster = [p for p in points if p.ratio.value < point.ratio.value]
        assert best == all((p.loss, p.divergence) > (point.loss, point.divergence) for p in faster)
    chosen = points[report.chosen]
    assert chosen == next(p for p in points if max(p.loss, p.held_out_loss) <= 0.3)
    assert pipeline.describe(out).plan.schedule == chosen.schedule
    assert 0.8 < report.unmerged["top1"] <= 1
    assert report.loss == "top-1 accuracy lost"

    by_macs.clear()  # the storage knows all of it: other limits choose anew
    again = tomexport.search(digits.checkpoint, images, tmp_path / "again.onnx", **limits, **SMALL)
    assert by_macs == []
    assert again.points == points
    within = [point for point in points if point.gmac <= most + 1e-4]
    assert again.points[again.chosen].loss == min(point.loss for point in within)


def test_lists_are_searched_and_noted(digits, images, by_macs, tmp_path):
    journal = str(tmp_path / "s.journal")
    limit = 0.75 * pipeline.plan(digits.checkpoint, "none").macs_unreduced / 1e9
    report = tomexport.search(
        digits.checkpoint, images, tmp_path / "best.onnx", max_gmac=limit, trials=2,
        storage=journal, evaluations=5, **SMALL | {"families": ["list"]},
    )  # fmt: skip
    assert all(point.schedule.startswith("list:") for point in report.points)
    assert all(point.gmac <= limit for point in report.points)
    (said,) = [note for note in report.notes if "exponential" in note]
    assert re.match(r"at \d of 2 budgets of MACs the list that was found is nearer", said)
    damaged = Path(journal).read_text().replace('"schedule":"list:', '"schedule":"lost:')
    Path(journal).write_text(damaged)
    with pytest.raises(ArtifactError, match="MACs in the storage is damaged"):
        tomexport.search(
            digits.checkpoint, images, tmp_path / "other.onnx", max_gmac=limit, trials=2,
            storage=journal, **SMALL | {"families": ["list"]},
        )  # fmt: skip


def test_what_a_method_cannot_do_is_left_out_and_said(digits, images, by_macs, tmp_path):
    report = tomexport.search(
        digits.checkpoint, images, tmp_path / "best.onnx", max_drop=1, trials=1,
        methods=["evo-vit"], **SMALL | {"families": ["const"]},
    )  # fmt: skip
    assert report.points == ()
    assert not report.passed
    assert report.notes[-2].startswith("13 points could not be tried, the first: evo-vit chooses")


def test_the_time_is_measured_in_turns(digits, images, tmp_path):
    report = tomexport.search(
        digits.checkpoint, images, tmp_path / "best.onnx", max_drop=1, trials=1,
        **SMALL | {"families": ["none"]},
    )  # fmt: skip
    (point,) = report.points
    assert 0.3 < point.ratio.value < 3
    assert point.ratio.low <= point.ratio.value <= point.ratio.high
    assert point.loss == 0
    assert report.latency_ms(point) == pytest.approx(
        report.unmerged["latency_ms"] * point.ratio.value, abs=1e-3
    )


def _command(digits, tmp_path, *more):
    return [
        "search", str(digits.checkpoint), "--images", str(digits.held_out), "--limit", "20",
        "-o", str(tmp_path / "best.onnx"), "--family", "none", "--trials", "1",
        "--backend", "onnxruntime", "--json", *more,
    ]  # fmt: skip


def test_the_command_writes_front_and_picture(digits, by_macs, tmp_path, capsys):
    front, png = tmp_path / "front.json", tmp_path / "front.png"
    more = ["--max-drop", "0.5", "--front", str(front), "--png", str(png)]
    assert main(_command(digits, tmp_path, *more)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(front.read_text())
    (point,) = printed["points"]
    assert (point["schedule"], point["on_front"], point["chosen"]) == ("none", True, True)
    assert point["latency_ms"] == printed["unmerged"]["latency_ms"] == 10.0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "best.onnx").is_file()


def test_without_a_point_within_the_limits_the_code_is_1(digits, by_macs, tmp_path, capsys):
    assert main(_command(digits, tmp_path, "--max-latency-ms", "9.9")) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False
    assert printed["path"] is None
    assert len(printed["points"]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Say what the file may cost: --max-drop"),
        ({"max_drop": 2}, "--max-drop 2 is no share"),
        ({"max_drop": 0.1, "trials": 0}, "--trials 0 cannot be kept"),
        ({"max_drop": 0.1, "minutes": float("nan")}, "--minutes nan cannot be kept"),
        ({"max_latency_ms": -1}, "--max-latency-ms -1 cannot be kept"),
        ({"max_gmac": 1, "seconds": -1}, "-1 seconds is no length of time"),
    ],
)
def test_what_cannot_be_asked(digits, images, tmp_path, options, message):
    with pytest.raises(PlanError, match=message):
        tomexport.search(digits.checkpoint, images, tmp_path / "best.onnx", **options)


def test_more_threads_than_there_are(digits, images, tmp_path):
    with pytest.raises(BackendError, match="9999 threads cannot be timed"):
        tomexport.search(
            digits.checkpoint, images, tmp_path / "best.onnx", max_drop=0.1, threads=9999
        )


def test_a_half_that_cannot_be_read(merged, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    found = ImageSet.find(tmp_path)
    both = (found.take([0]), found.take([1]))
    with pytest.raises(ImageError, match=r"None of the 1 images of .* could be read.*b\.png"):
        prepare(both, pipeline.describe(merged), lambda pixels: pixels[:, 0, 0])


def test_halves_are_drawn_and_whole():
    images = ImageSet(Path("x"), tuple(f"{i:02d}" for i in range(21)), None, 21)
    searched, held_out = halves(images)
    assert (len(searched), len(held_out)) == (11, 10)
    assert sorted(searched.names + held_out.names) == list(images.names)
    assert searched.names != images.names[::2]  # names that alternate between classes do no harm
    assert halves(images) == (searched, held_out)


def test_other_images_can_be_held_out(digits, images, by_macs, tmp_path):
    others = ImageSet.find(digits.train, limit=30, labels="none")
    report = tomexport.search(
        digits.checkpoint, images, tmp_path / "best.onnx", held_out=others, max_drop=1, trials=1,
        **SMALL,
    )  # fmt: skip
    assert report.images.startswith("60 searched on, 30 held out: 60 of 500 in ")
    assert report.images.endswith(f"; 30 of 1297 in {digits.train}")
    assert report.loss.startswith("images with another")  # not all of them have labels


def test_labels_must_be_the_models(digits, images, by_macs, tmp_path):
    wanted = {"max_drop": 1, "trials": 1} | SMALL
    two = dataclasses.replace(images, n_names=2)
    report = tomexport.search(digits.checkpoint, two, tmp_path / "best.onnx", **wanted)
    assert report.loss.startswith("images with another first class")
    assert any("2 names do not say which of the model's 10 classes" in n for n in report.notes)
    beyond = dataclasses.replace(images, labels=(10,) * len(images))
    with pytest.raises(ImageError, match="is of class 10, and the model has 10, counted from 0"):
        tomexport.search(digits.checkpoint, beyond, tmp_path / "other.onnx", **wanted)


def test_both_halves_are_judged_alike(merged, images):
    searched, _ = halves(images)
    some = [label if name in searched.names else None
            for name, label in zip(images.names, images.labels, strict=True)]  # fmt: skip
    prepared = prepare(halves(dataclasses.replace(images, labels=tuple(some))),
                       pipeline.describe(merged), lambda pixels: pixels[:, 0, 0])  # fmt: skip
    assert prepared.search.top1 is None
    assert prepared.held_out.top1 is None


def test_one_image_is_too_few(digits, images, tmp_path):
    with pytest.raises(ImageError, match="One image cannot be searched on and held out"):
        tomexport.search(digits.checkpoint, images.take([0]), tmp_path / "b.onnx", max_drop=0.1)


def test_int8_needs_the_format_of_its_tool(digits, images, tmp_path):
    with pytest.raises(BackendError, match=r"is written as \.xml, not '\.onnx'"):
        tomexport.search(
            digits.checkpoint, images, tmp_path / "b.onnx", max_drop=0.1, precisions=["int8"],
            backend="openvino",
        )  # fmt: skip


def test_int8_is_a_precision_as_others(digits, images, by_macs, tmp_path, monkeypatch):
    measured = []
    timed = Meter._time
    monkeypatch.setattr(
        Meter, "_time",
        lambda meter, job: (measured.append(Path(job.path).read_bytes()), timed(meter, job))[1],
    )  # fmt: skip
    report = tomexport.search(
        digits.checkpoint, images, tmp_path / "best.onnx", max_drop=1, trials=1,
        **SMALL | {"families": ["none"], "precisions": ["int8"]},
    )  # fmt: skip
    (point,) = report.points
    assert point.precision == "int8"
    assert 0 < point.divergence < 1
    best = pipeline.describe(tmp_path / "best.onnx")
    assert best.quantization["images"] == len(images) / 2
    assert measured == [(tmp_path / "best.onnx").read_bytes()]  # what was judged is delivered


def test_a_command_killed_in_mid_trial_goes_on_and_two_share_the_work(digits, tmp_path):
    folder, journal = tmp_path / "out", tmp_path / "s.journal"
    folder.mkdir()
    most = pipeline.plan(digits.checkpoint, "const:11").macs / 1e9 + 1e-4

    def search(name):
        words = ["search", digits.checkpoint, "--images", digits.held_out, "--limit", 20,
                 "-o", folder / name, "--family", "const", "--max-gmac", most, "--storage", journal,
                 "--backend", "onnxruntime", "--seconds", 0, "--threads", 1, "--json"]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "tomexport", *map(str, words)], stdout=subprocess.PIPE, text=True
        )

    def measured():
        if not journal.exists() or not journal.read_bytes().endswith(b"\n"):
            return []
        with warnings.catch_warnings(action="ignore"):
            storage = JournalStorage(JournalFileBackend(str(journal)))
        trials = [
            t
            for study in storage.get_all_studies()
            for t in storage.get_all_trials(study._study_id)
        ]
        return [t.user_attrs["result"]["schedule"] for t in trials if t.state.name == "COMPLETE"]

    killed = search("killed.onnx")
    while not measured():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    before = measured()
    assert not list(folder.iterdir())

    both = [search("one.onnx"), search("other.onnx")]
    said = [json.loads(each.communicate(timeout=300)[0]) for each in both]
    assert [each.returncode for each in both] == [0, 0]
    after = measured()
    assert after[: len(before)] == before
    assert sorted(after) == [f"const:{r}" for r in range(11, 14)]
    assert {pipeline.describe(path).plan.schedule for path in folder.iterdir()} <= set(after)
    assert max(len(each["points"]) for each in said) == 3
