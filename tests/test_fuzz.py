"""Damaged images, tables, checkpoints, artifacts and storage: refused or used, never a mess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tomexport
from tomexport.cli import main

_SECONDS = 60  # none takes so long, unless it hangs
FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.fixture(scope="module")
def sound(seeded, tmp_path_factory):
    """A folder with one of each kind, sound, each beside what belongs to it."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("sound")
    model = seeded("test_vit", img_size=32)
    for name in ("pth", "safetensors", "onnx", "xml", "images", "storage"):
        (folder / name).mkdir()
    torch.save(model.state_dict(), folder / "pth/model.pth")
    save_file(dict(model.state_dict()), folder / "safetensors/model.safetensors")
    for name in ("onnx", "xml"):
        tomexport.export(model, "list:1,0", folder / name / f"model.{name}", verify=False)
    random = np.random.default_rng(0)
    for i, suffix in enumerate(("png", "jpg", "bmp", "webp", "tif")):
        pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i}.{suffix}")
    lines = [f"{i}.{s},{i}" for i, s in enumerate(("png", "jpg", "bmp", "webp", "tif"))]
    (folder / "images/labels.csv").write_text("\n".join(["file,class", *lines, ""]))
    drawn = random.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images/set.npz", images=drawn, labels=np.arange(12))
    words = [word.format(sound=folder, file=folder / "storage/s.journal", out=folder / "storage")
             for word in _SEARCH]  # fmt: skip
    assert main(words) == 0
    return folder


_EVALUATE = ("evaluate", "{sound}/onnx/model.onnx", "--backend", "onnxruntime", "--images")
_PLAN = ("plan", "{file}", "--schedule", "list:1,0")
_SEARCH = (
    "search", "{sound}/pth/model.pth", "--images", "{sound}/images/set.npz", "--family", "none",
    "--family", "list", "--max-gmac", "9", "--trials", "2", "--evaluations", "1", "--seconds", "0",
    "--threads", "1", "-o", "{out}/out.onnx", "--storage", "{file}",
)  # fmt: skip
_QUANTIZE = ("quantize", "{sound}/onnx/model.onnx", "--images", "{folder}", "--no-timing",
             "-o", "{out}/out.onnx")  # fmt: skip
_LEARN = ("learn", "{sound}/pth/model.pth", "--images", "{file}", "--schedule", "list:1,0",
          "--epochs", "1", "-o", "{out}/out.pth")  # fmt: skip
_SHOW = ("show", "{sound}/onnx/model.onnx", "{file}", "-o", "{out}/out.png")
_EXPORT = ("export", "{file}", "--schedule", "list:1,0", "-o", "{out}/out.onnx", "--no-verify")
# what is damaged, the command that reads it, how often
_EACH = {
    "images": [
        ("images/0.png", (*_EVALUATE, "{folder}"), 12),
        ("images/1.jpg", (*_EVALUATE, "{folder}"), 12),
        ("images/3.webp", (*_EVALUATE, "{folder}"), 12),
        ("images/4.tif", (*_EVALUATE, "{folder}"), 12),
        ("images/labels.csv", (*_EVALUATE, "{folder}"), 24),
        ("images/set.npz", (*_EVALUATE, "{file}"), 16),
    ],
    "checkpoints": [
        ("pth/model.pth", _PLAN, 30),
        ("safetensors/model.safetensors", _PLAN, 30),
        ("pth/model.pth", _EXPORT, 6),
    ],
    "artifacts": [
        ("onnx/model.onnx", ("verify", "{file}", "--backend", "onnxruntime"), 20),
        ("onnx/model.onnx", ("verify", "{file}", "--backend", "openvino"), 16),
        ("xml/model.xml", ("verify", "{file}"), 20),
        ("xml/model.bin", ("verify", "{folder}/model.xml"), 10),
    ],
    "what others read": [
        ("images/0.png", _SHOW, 10),
        ("images/labels.csv", _QUANTIZE, 8),
        ("images/set.npz", _LEARN, 8),
        ("storage/s.journal", _SEARCH, 10),
    ],
}


def test_there_are_two_hundred():
    assert sum(count for jobs in _EACH.values() for *_, count in jobs) >= 200


@pytest.mark.parametrize("kind", _EACH)
def test_what_is_damaged_is_refused_or_used(kind, sound, tmp_path):
    jobs = [
        {"source": str(sound / source), "count": count, "seed": seed, "folder": str(tmp_path),
         "words": [word.replace("{sound}", str(sound)) for word in words]}
        for seed, (source, words, count) in enumerate(_EACH[kind])
    ]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"TOMEXPORT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(FUZZ), str(tmp_path / "jobs.json")], capture_output=True, text=True,
        timeout=600, env=environment,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    reports = [line for line in lines if "code" in line]
    last = lines[-1] if lines else None
    wanted = sum(count for *_, count in _EACH[kind])
    assert len(reports) == wanted, f"ended with {done.returncode} at {last}: {done.stderr[-3000:]}"
    for report in reports:
        assert report["code"] in (0, 1, 2), report
        assert "Traceback" not in report["err"], report
        assert report["code"] != 2 or "error: " in report["err"], report
        assert report["seconds"] < _SECONDS, report
        assert report["left"] == ([] if report["code"] else report["writes"]), report
    codes = [report["code"] for report in reports]
    assert codes.count(2) > len(codes) / 10  # else the damage does not reach what is read
