"""Learning on digits: it helps, it can stop anywhere, and what cannot be is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import tomexport
from tomexport.calib.images import ImageSet
from tomexport.calib.learn import learn as learning
from tomexport.calib.learn import train as training
from tomexport.calib.learn.learn import Judgement, learn, state_of
from tomexport.calib.learn.train import Course
from tomexport.cli import main
from tomexport.errors import ExportError, ImageError, LearnError, RewriteError

SHORT = Course(epochs=1, batch=16, lr=1e-3)
SCHEDULE = "list:12,12"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixty-four crops of a photograph, of which one is no image."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photos")
    photograph = Image.fromarray(data.astronaut())
    for i in range(64):
        left, top = divmod(i, 8)
        photograph.crop((left * 40, top * 40, left * 40 + 180, top * 40 + 180)).save(
            folder / f"{i:02}.png"
        )
    (folder / "20.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def vit(seeded):
    return seeded("test_vit", num_classes=7)


def _own(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if "metric_layer" in name}


@pytest.fixture
def interrupted(monkeypatch):
    """Learn until a step, during which Ctrl-C is pressed."""
    whole = training._step

    def run(step, *arguments, **options):
        def press(soft, lessons, number, optimizer):
            if number == step:
                os.kill(os.getpid(), signal.SIGINT)
            return whole(soft, lessons, number, optimizer)

        with monkeypatch.context() as patch:
            patch.setattr(training, "_step", press)
            with pytest.raises(KeyboardInterrupt):
                learn(*arguments, **options)

    return run


def test_what_was_stopped_goes_on_to_the_same_result(vit, photos, tmp_path, interrupted):
    images = ImageSet.find(photos)
    course = dataclasses.replace(SHORT, epochs=2)
    once = learn(vit, images, tmp_path / "once.pth", schedule=SCHEDULE, course=course)
    said = []
    interrupted(2, vit, images, tmp_path / "twice.pth", schedule=SCHEDULE, course=course,
                progress=said.append)  # fmt: skip
    assert said[-1].startswith("step 3 of 6, loss ")
    assert said[-1].endswith(" left")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once.pth", "twice.pth.state"]
    twice = learn(vit, images, tmp_path / "twice.pth", schedule=SCHEDULE, course=course)
    assert "went on from step 3" in twice.notes
    first, second = _own(tmp_path / "once.pth"), _own(tmp_path / "twice.pth")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert twice.judgements == once.judgements
    assert twice.skipped == once.skipped
    assert twice.learned.loss == once.learned.loss
    assert not state_of(tmp_path / "twice.pth").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "const:5"}, "schedule list:12,12, now const:5"),
        ({"dim": 8}, "dim None, now 8"),
        ({"course": dataclasses.replace(SHORT, lr=2e-3)}, "lr 0.001, now 0.002"),
        ({"course": dataclasses.replace(SHORT, seed=1)}, "seed 0, now 1"),
    ],
)
def test_what_was_begun_otherwise_is_refused(vit, photos, tmp_path, interrupted, options, words):
    images, out = ImageSet.find(photos), tmp_path / "out.pth"
    request = {"schedule": SCHEDULE, "course": SHORT}
    interrupted(0, vit, images, out, **request)
    begun = state_of(out).read_bytes()
    with pytest.raises(LearnError, match="what another request left") as of:
        learn(vit, images, out, **(request | options))
    assert words in str(of.value)
    with pytest.raises(LearnError, match="images "):
        learn(vit, ImageSet.find(photos, limit=40), out, **request)
    assert state_of(out).read_bytes() == begun
    state_of(out).write_bytes(begun[: len(begun) // 2])
    with pytest.raises(LearnError, match="no state of `learn`, or it is damaged"):
        learn(vit, images, out, **request)


def test_minutes_become_steps(vit, photos, tmp_path):
    images, out = ImageSet.find(photos, limit=12), tmp_path / "out.pth"
    course = Course(minutes=0.02, batch=4)
    report = learn(vit, images, out, schedule=SCHEDULE, course=course)
    assert report.learned.steps >= 4
    assert report.learned.seconds < 30


def test_embeddings_without_bounds_are_refused(vit, photos, tmp_path):
    course = dataclasses.replace(SHORT, lr=3e37, epochs=3)
    with pytest.raises(LearnError, match="is not finite"):
        learn(vit, ImageSet.find(photos), tmp_path / "out.pth", schedule=SCHEDULE, course=course)


def test_unreadable_images_are_counted(vit, photos, tmp_path):
    report = learn(vit, ImageSet.find(photos), tmp_path / "o.pth", schedule=SCHEDULE, course=SHORT)
    assert list(report.skipped) == ["20.png"]
    assert report.notes[0].startswith("1 images could not be read; the first: 20.png: ")
    assert report.n_learned + report.n_held_out == 63
    assert {report.n_learned, report.n_held_out} & {47, 15}
    nothing = ImageSet.find(photos).take([20] * 8)
    with pytest.raises(ImageError, match="None of the 2 images held out could be read"):
        learn(vit, nothing, tmp_path / "p.pth", schedule=SCHEDULE, course=SHORT)


def test_the_model_stays_as_it_is(vit, photos, tmp_path):
    before = copy.deepcopy(vit.state_dict())
    report = learn(vit, ImageSet.find(photos), tmp_path / "o.pth", schedule=SCHEDULE, course=SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert all(parameter.requires_grad for parameter in vit.parameters())
    assert tomexport.reduce(report.module, "const:9").plan.method == "dtem"
    assert tomexport.reduce(vit, "const:9").plan.method == "tome"


def test_labels_can_be_the_targets(vit, photos, tmp_path):
    images = ImageSet.find(photos)
    with pytest.raises(ImageError, match="labels cannot be the targets"):
        learn(vit, images, tmp_path / "o.pth", targets="labels", course=SHORT)
    labelled = dataclasses.replace(images, labels=tuple(i % 7 for i in range(64)))
    report = learn(vit, labelled, tmp_path / "o.pth", schedule=SCHEDULE, targets="labels",
                   course=SHORT)  # fmt: skip
    (judged,) = report.judgements
    assert [each.n for each in judged.accuracy] == [report.n_held_out] * 3
    beyond = dataclasses.replace(images, labels=(7,) * 64)
    with pytest.raises(ImageError, match="is of class 7, and the model has 7, counted"):
        learn(vit, beyond, tmp_path / "p.pth", targets="labels", course=SHORT)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"output": "out.onnx"},
            ExportError,
            "a checkpoint is a .safetensors or .pth, not '.onnx'",
        ),
        ({"output": "absent/out.pth"}, ExportError, "There is no folder"),
        ({"output": "there.pth"}, ExportError, "exists already"),
        ({"output": "folder.pth"}, ExportError, "is a folder"),
        ({"schedule": "none"}, LearnError, "nothing would learn"),
        ({"targets": "logit"}, LearnError, "Unknown targets 'logit'"),
        ({"dim": 0}, LearnError, "--dim 0 holds nothing"),
        ({"few": 7}, ImageError, "learning takes 8 at least"),
    ],
)
def test_requests_that_cannot_be_met(vit, photos, tmp_path, options, error, words):
    (tmp_path / "there.pth").write_text("precious")
    (tmp_path / "folder.pth").mkdir()
    options = {"schedule": SCHEDULE, "output": "out.pth", "few": None} | options
    images = ImageSet.find(photos, limit=options.pop("few"))
    with pytest.raises(error, match=words):
        learn(vit, images, tmp_path / options.pop("output"), course=SHORT, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.pth", "there.pth"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "by --epochs or by --minutes"),
        ({"epochs": 1, "minutes": 1.0}, "not by both"),
        ({"epochs": 0}, "--epochs 0 is out of range"),
        ({"minutes": float("nan")}, "--minutes nan is out of range"),
        ({"epochs": 1, "lr": -1.0}, "--lr -1.0 is out of range"),
        ({"epochs": 1, "batch": 0}, "--batch 0 is out of range"),
        ({"epochs": 1, "seed": -1}, "--seed -1 is out of range; use 0"),
    ],
)
def test_courses_that_cannot_be(options, words):
    with pytest.raises(LearnError, match=words):
        Course(**options)


def test_models_that_cannot_learn_are_refused(seeded, photos, tmp_path):
    images, out = ImageSet.find(photos), tmp_path / "out.pth"
    with pytest.raises(RewriteError, match="of the family 'sret', whose attention"):
        learn(seeded("sret_t"), images, out)
    with pytest.raises(RewriteError, match="has no classifier"):
        learn(seeded("test_vit", num_classes=0), images, out)
    report = learn(seeded("test_vit"), images, out, schedule=SCHEDULE, course=SHORT)
    with pytest.raises(RewriteError, match="holds weights of dtem already"):
        learn(report.module, images, tmp_path / "again.pth")
    with pytest.raises(LearnError, match="would replace the model"):
        learn(out, images, out, force=True)


def test_each_step_is_the_same_each_time_and_each_epoch_shows_all():
    course = Course(epochs=2, batch=16, seed=5)
    assert course.n_batches(50) == 4
    epochs = [[course.indices(50, 4 * epoch + i) for i in range(4)] for epoch in range(2)]
    assert epochs[0] == [course.indices(50, i) for i in range(4)]
    assert all(sorted(i for batch in epoch for i in batch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert max(len(batch) for batch in epochs[0]) <= 16


def _judgement(kl, agreement):
    estimate = [
        learning.fidelity.Estimate((low + high) / 2, low, high, 40) for low, high in (kl, agreement)
    ]
    likeness = learning.fidelity.Likeness(None, None, estimate[0])
    return Judgement("const:1", (), (1, 1, 1), likeness, likeness, estimate[1], estimate[0], ())


@pytest.mark.parametrize(
    ("kl", "agreement", "words"),
    [
        ((-0.2, -0.1), (-0.01, 0.02), "learning helps"),
        ((-0.2, 0.1), (-0.01, 0.02), "no difference that 40 images show: keep plain ToMe"),
        ((0.1, 0.2), (-0.01, 0.02), "learning harms: keep plain ToMe"),
        ((-0.2, -0.1), (-0.05, -0.02), "learning harms: keep plain ToMe"),
    ],
)
def test_the_verdict_is_plain(kl, agreement, words):
    assert _judgement(kl, agreement).verdict == words


# ---- the command


def test_the_command_tells_what_learning_changed(seeded, photos, tmp_path, capsys):
    model, out = tmp_path / "model.pth", tmp_path / "out.safetensors"
    torch.save(seeded("test_vit").state_dict(), model)
    command = ["learn", model, "--images", photos, "-o", out, "--arch", "test_vit", "--epochs", 1,
               "--schedule", SCHEDULE, "--judge", "const:5", "--limit", 32]  # fmt: skip
    assert main([*map(str, command)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("learned at list:12,12 from 24 images, judged on 7 others", "const:5, tome",
                  "const:5, dtem", "paired, 95 %", "unmerged: "):  # fmt: skip
        assert words in shown
    assert main([*map(str, command), "--force", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [each["schedule"] for each in data["judgements"]] == [SCHEDULE, "const:5"]
    assert data["judgements"][0]["verdict"]
    plan = tomexport.plan(out, "const:5")
    assert (plan.method, plan.model) == ("dtem", "test_vit")
    assert data["judgements"][1]["gmacs"][1] == plan.macs / 1e9


def test_ctrl_c_leaves_the_state_and_the_command_goes_on(seeded, photos, tmp_path, capsys):
    model, out = tmp_path / "model.pth", tmp_path / "out.pth"
    torch.save({"state_dict": seeded("test_vit").state_dict(), "arch": "test_vit"}, model)
    command = ["learn", model, "--images", photos, "-o", out, "--epochs", 400, "--batch", 8,
               "--schedule", SCHEDULE]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tomexport", *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not state_of(out).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    shown, error = process.communicate(timeout=120)
    assert (process.returncode, shown) == (130, "")
    assert "steps are in out.pth.state; the same command goes on" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "out.pth.state"]
    done = torch.load(io.BytesIO(state_of(out).read_bytes()[32:]), weights_only=True)
    assert 0 < done["step"] < done["n_steps"] == 400 * 6
