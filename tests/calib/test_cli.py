"""The commands of calib: one result on stdout, exit codes, one line for an error."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from tomexport.cli import main


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command line in this process, with a cache of its own: (code, out, err)."""
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "cache"))

    def call(*arguments):
        capsys.readouterr()
        return main([str(argument) for argument in arguments]), *capsys.readouterr()

    return call


def test_evaluate_for_people(run, merged, digits):
    options = ("--images", digits.held_out, "--limit", 50, "--backend", "onnxruntime")
    code, out, err = run("evaluate", merged, *options)
    assert code == 0
    assert err == "note: labels are those of held_out.npz\n"
    lines = out.splitlines()
    assert lines[0].startswith(f"{merged}: test_vit, tome, const:8")
    assert re.match(r"unmerged +top-1 +\d+\.\d% \(\d+\.\d–\d+\.\d\)$", lines[1].rstrip())
    assert re.match("onnxruntime f32 (fused|standard) +top-1 ", lines[3])
    figures = [line.split("  ")[0] for line in map(str.strip, lines[4:8])]
    assert figures == ["top-5", "top-1 above unmerged", "agreement with unmerged", "KL, nats"]
    assert max(map(len, lines[1:9])) <= 80
    assert "50 images (50 of 500 in" in out
    assert "unmerged: merged.none.onnx" in out
    assert "kept from an earlier run" not in out
    assert "kept from an earlier run: 50 of 50 images" in run("evaluate", merged, *options)[1]


def test_evaluate_for_machines_and_limits(run, merged, digits):
    options = ("--images", digits.held_out, "--limit", 50, "--backend", "onnxruntime", "--json")
    code, out, _ = run("evaluate", merged, *options, "--min-agreement", 1)
    report = json.loads(out)
    (found,) = report["runs"]
    assert code == (0 if found["likeness"]["top1"]["value"] == 1 else 1)
    assert run("evaluate", merged, *options, "--min-top1", 1)[0] == 1
    assert report["images"].startswith("50 of 500")
    assert 0 < found["accuracy"]["top1"]["low"] < found["accuracy"]["top1"]["high"] <= 1


def test_evaluate_names_what_it_skips(run, merged, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), "u1")
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"no image")
    code, out, err = run("evaluate", merged, "--images", folder, "--backend", "onnxruntime")
    assert (code, err) == (0, "")
    assert f"2 images (all of {folder}, less 1 unreadable: 1.png)" in out
    assert "skipped: " in out
    assert "1.png is no readable image" in out


def test_evaluate_refuses_in_one_line(run, merged, tmp_path):
    code, out, err = run("evaluate", merged, "--images", tmp_path / "absent")
    assert (code, out) == (2, "")
    assert err.startswith("error: There is no folder")
    assert err.count("\n") == 1


def test_quantize(run, merged, digits, tmp_path):
    path = tmp_path / "int8.onnx"
    options = ("--images", digits.held_out, "--limit", 16, "--no-timing")
    code, out, err = run("quantize", merged, "-o", path, *options)
    assert code == 0
    assert err == "note: labels are those of held_out.npz\n"
    assert f"{path}, int8 by onnxruntime" in out
    assert "calibrated on 16 images, judged on 484 (484 of 500 in" in out
    assert "beside its float32 self: first class kept" in out
    assert f"saved: {path}" in out
    again = run("quantize", merged, "-o", path, *options)
    assert again[0] == 2
    assert "exists already; --force replaces it" in again[2]
    code, out, _ = run("quantize", merged, "-o", path, *options, "--force", "--json")
    assert json.loads(out)["files"] == {str(path): path.stat().st_size}
