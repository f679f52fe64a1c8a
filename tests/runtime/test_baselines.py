"""Which files stand beside which, and the command that writes those that are missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import shutil

import pytest

import tomexport
from tomexport.cli import cli
from tomexport.errors import ArtifactError, BackendError
from tomexport.pipeline import describe
from tomexport.runtime import baselines
from tomexport.runtime.backend import read_artifact
from tomexport.runtime.baselines import find, forms
from tomexport.runtime.load import BACKENDS

NOTHING = {"none": None, "bound": None}


def _find(path, **given):
    return find(BACKENDS[0], path, describe(path), NOTHING | given)


def test_baselines_beside_the_file_are_found(files):
    found, missing = _find(files / "model.onnx")
    assert {name: peer.name for name, (peer, _) in found.items()} == {
        "none": "model.none.onnx", "bound": "model.bound.onnx"
    }  # fmt: skip
    assert found["none"][1].plan.removed_total == 0
    assert missing == []


def test_files_that_are_named_come_first(files, tmp_path):
    shutil.copy(files / "model.onnx", tmp_path / "model.onnx")
    found, missing = _find(tmp_path / "model.onnx", none=files / "model.none.onnx")
    assert found["none"][0] == files / "model.none.onnx"
    assert missing[0] == "no free-merge bound: there is no model.bound.onnx beside the file"


def test_a_file_that_is_named_must_be_there(files, tmp_path):
    with pytest.raises(BackendError, match="There is no file"):
        _find(files / "model.onnx", none=tmp_path / "gone.onnx")


OTHERS = {
    "weights": (
        "none",
        {"weights_sha256": "0" * 64},
        "its SHA-256 of the weights is 00000",
    ),
    "batch": (
        "none",
        {"input_shape": (2, 3, 160, 160)},
        "its input shape is (2, 3, 160, 160)",
    ),
    "any batch": ("none", {"input_shape": (None, 3, 160, 160)}, "and (1, 3, 160, 160) is needed"),
    "features": ("none", {"output": "features"}, "its output is features, and logits is needed"),
    "half": ("none", {"half": True}, "its storage as float16 is True"),
    "attention": ("bound", {"prop_attn": False}, "its proportional attention is False"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_of_another_model_is_refused(files, monkeypatch, case):
    name, changes, message = OTHERS[case]

    def read(backend, path):
        metadata, golden = read_artifact(backend, path)
        return dataclasses.replace(metadata, **changes if name in path.name else {}), golden

    monkeypatch.setattr(baselines, "read_artifact", read)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        _find(files / "model.onnx")


def test_files_that_are_something_else_are_refused(files, seeded, tmp_path):
    model, unmerged = files / "model.onnx", files / "model.none.onnx"
    with pytest.raises(ArtifactError, match=r"cannot be the unmerged .* removed is \d+, and 0"):
        _find(model, none=model)
    with pytest.raises(ArtifactError, match=r"the free-merge bound .* method is tome, and bound"):
        _find(model, bound=model)
    with pytest.raises(BackendError, match="onnxruntime does not read"):
        _find(model, none=files / "model.xml")
    other = tmp_path / "other.onnx"
    tomexport.export(seeded("test_vit"), "const:4", other, method="bound", verify=False)
    with pytest.raises(ArtifactError, match="its list of tokens removed is"):
        _find(model, none=unmerged, bound=other)


def test_a_file_that_merges_nothing_has_no_baselines(files):
    found, missing = _find(files / "model.none.onnx")
    assert found == {}
    assert "nothing to compare" in missing[0]
    with pytest.raises(ArtifactError, match="leave out --baseline and --bound"):
        _find(files / "model.none.onnx", none=files / "model.none.onnx")


def _command(path):
    note = _find(path)[1][-1]
    assert note.startswith("export --with-baselines writes what is missing")
    _, _, command = note.partition(": ")
    return shlex.split(command)


def test_the_command_for_baselines_can_be_run(tmp_path):
    path = tmp_path / "model.onnx"
    tomexport.export("test_vit", "const:8", path, random_weights=3, batch=2, prop_attn=False,
                     opset=20, verify=False)  # fmt: skip
    program, *arguments = _command(path)
    assert program == "tomexport"
    assert arguments[:3] == ["test_vit", "--random-weights", "3"]
    options = dict(zip(arguments[3::2], arguments[4::2], strict=False))
    assert options["--schedule"] == "const:8"
    assert (options["--batch"], options["--opset"], options["--img-size"]) == ("2", "20", "160x160")
    known = {opt for parameter in cli.commands["export"].params for opt in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= known
    assert {"--no-prop-attn", "--with-baselines", "--force"} <= set(arguments)


def test_a_checkpoint_is_named_with_its_architecture(seeded, tmp_path):
    import torch

    torch.save(seeded("test_vit").state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "model.onnx"
    tomexport.export(tmp_path / "weights.pth", "const:8", path, arch="test_vit", verify=False)
    assert _command(path)[1:4] == ["weights.pth", "--arch", "test_vit"]


def test_there_is_no_command_for_a_module_or_without_the_exporter(files, tmp_path, monkeypatch):
    shutil.copy(files / "model.onnx", tmp_path / "model.onnx")
    assert _command(tmp_path / "model.onnx") == []
    tomexport.export("test_vit", "const:8", tmp_path / "drawn.onnx", random_weights=0, verify=False)
    assert _command(tmp_path / "drawn.onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _command(tmp_path / "drawn.onnx") == []


def test_forms_of_a_file(files, tmp_path):
    path, metadata = files / "model.onnx", describe(files / "model.onnx")
    assert forms(path, metadata, "auto") == {
        "fused": (str(path), "auto"), "portable": (str(path), "off")
    }  # fmt: skip
    assert forms(path, metadata, "off") == {"portable": (str(path), "off")}
    assert list(forms(tmp_path / "model.xml", metadata, "auto")) == ["fused"]
    assert list(forms(path, describe(files / "model.xml"), "auto")) == ["portable"]
    assert list(forms(path, describe(files / "model.none.onnx"), "auto")) == ["none"]
    assert list(forms(path, describe(files / "model.bound.onnx"), "auto")) == ["bound"]
