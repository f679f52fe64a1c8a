"""Files appear whole or not at all, and never over what should stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tomexport
from tomexport import delivery, scratch
from tomexport.errors import ExportError
from tomexport.runtime import openvino_backend


def _listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.pt", r"the suffix '\.pt' says no format"),
        ("model", "the suffix '' says no format"),
        ("folder.onnx", "is a folder; name a file in it"),
        ("absent/model.onnx", "There is no folder .*absent for model.onnx; make it first"),
        ("there.onnx", "exists already; --force replaces it"),
        ("weights.xml", r"weights\.bin exists already"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_any_work(tmp_path, name, message):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "there.onnx").write_text("mine")
    (tmp_path / "weights.bin").write_text("mine")
    before = _listing(tmp_path)
    with pytest.raises(ExportError, match=message):
        tomexport.export("no such model", "const:8", tmp_path / name)
    assert _listing(tmp_path) == before


def test_the_checkpoint_itself_is_never_replaced(tmp_path, seeded):
    checkpoint = tmp_path / "model.bin"
    torch.save(seeded("test_vit").state_dict(), checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(ExportError, match=r"would replace the checkpoint .*model\.bin itself"):
        tomexport.export(checkpoint, "const:8", tmp_path / "model.xml", force=True)
    assert checkpoint.read_bytes() == before


def test_force_replaces(tmp_path, seeded):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    tomexport.export(seeded("test_vit"), "none", path, force=True, verify=False)
    assert path.stat().st_size > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "model.onnx"
    with delivery.staging(output) as folder:
        (folder / output.name).write_text("ours")
        output.write_text("theirs")
        with pytest.raises(ExportError, match="appeared meanwhile; --force replaces it"):
            delivery.publish(folder, output, force=False)
    assert _listing(tmp_path) == {"model.onnx": b"theirs"}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ExportError, match=r"could not be written in .*: Permission denied"),
        delivery.staging(tmp_path / "model.onnx"),
    ):
        pass


def test_a_signal_as_soon_as_the_folder_is_there_leaves_nothing(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def mkdir_and_end(self, *args, **kwargs):
        mkdir(self, *args, **kwargs)
        scratch.abandon()  # as the handler of the signal does, before it ends the process
        assert _listing(tmp_path) == {}
        raise SystemExit

    monkeypatch.setattr(Path, "mkdir", mkdir_and_end)
    with pytest.raises(SystemExit), delivery.staging(tmp_path / "model.onnx"):
        pass


def test_weights_are_in_place_before_what_reads_them(tmp_path, monkeypatch):
    moved = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (moved.append(self.name), replace(self, target))[1]
    )
    output = tmp_path / "model.xml"
    with delivery.staging(output) as folder:
        for name in ("model.xml", "model.bin"):
            (folder / name).write_text(name)
        delivery.publish(folder, output, force=False)
    assert moved == ["model.bin", "model.xml"]


def test_an_ir_that_was_cut_is_noticed(tmp_path, seeded):
    """OpenVINO itself does not notice a full disk."""
    path = tmp_path / "model.xml"
    tomexport.export(seeded("test_vit"), "const:8", path, verify=False)
    openvino_backend._require_whole(path)
    weights, graph = path.with_suffix(".bin").read_bytes(), path.read_text()
    path.with_suffix(".bin").write_bytes(weights[:-1])
    with pytest.raises(ExportError, match=r"was not written whole \(\d+ of \d+ bytes of weights\)"):
        openvino_backend._require_whole(path)
    path.with_suffix(".bin").write_bytes(weights)
    path.write_text(graph[:-10])
    with pytest.raises(ExportError, match="was not written whole"):
        openvino_backend._require_whole(path)
