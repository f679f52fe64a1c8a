"""One small model, exported once for all tests of the runtimes."""

from __future__ import annotations

import pytest

import tomexport


@pytest.fixture(scope="session")
def files(seeded, tmp_path_factory):
    """Give a folder with the same model as model.onnx and model.xml (model.bin).

    And as model.none.onnx, which merges nothing, and model.bound.onnx, where merging is a Slice.
    """
    folder = tmp_path_factory.mktemp("files")
    for name in ("model.onnx", "model.xml"):
        tomexport.export(seeded("test_vit"), "const:8", folder / name, verify=False)
    for name, schedule, method in (("none", "none", "tome"), ("bound", "const:8", "bound")):
        path = folder / f"model.{name}.onnx"
        tomexport.export(seeded("test_vit"), schedule, path, method=method, verify=False)
    return folder
