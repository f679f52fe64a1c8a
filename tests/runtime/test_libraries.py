"""What the `kernels` commands build and list."""

from __future__ import annotations

import dataclasses

import pytest

from tomexport.errors import BuildError, MissingExtraError, UnknownNameError
from tomexport.kernels import build, cache
from tomexport.runtime import libraries
from tomexport.runtime.libraries import build_libraries, stored_libraries
from tomexport.runtime.load import BACKENDS


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Record what would be built instead of building it."""
    targets = []
    monkeypatch.setattr(build, "build", lambda target, out: targets.append((target, out)))
    return targets


def test_all_that_is_installed_is_built(quick):
    build_libraries()
    expected = [build.Target(backend.name, backend.version()) for backend in BACKENDS]
    assert quick == [(target, None) for target in expected]
    assert "." in expected[0].version


def test_one_runtime_by_name(quick, tmp_path):
    build_libraries(["openvino"], march="x86-64-v3", out=tmp_path)
    (target, out) = quick[0]
    assert (target.runtime, target.march, out) == ("openvino", "x86-64-v3", tmp_path)


def test_another_machine_has_releases_of_its_own(quick, tmp_path):
    build_libraries(["openvino"], toolchain=tmp_path / "arm.cmake", out=tmp_path)
    assert quick[0][0].version is None


def test_requests_that_cannot_be_met(quick, monkeypatch):
    with pytest.raises(UnknownNameError, match="Unknown runtime 'onnx'"):
        build_libraries(["onnx"])
    absent = [dataclasses.replace(backend, module="absent_runtime") for backend in BACKENDS]
    monkeypatch.setattr(libraries, "BACKENDS", tuple(absent))
    with pytest.raises(MissingExtraError, match="There is no runtime here to build kernels for"):
        build_libraries()
    with pytest.raises(MissingExtraError, match="absent_runtime, which is not installed"):
        build_libraries(["onnxruntime"])
    assert quick == []


def test_the_list_says_which_are_in_use(fused):
    built = build.library("onnxruntime", BACKENDS[0].version())
    other = build.library("onnxruntime", "1.2.3")
    used = {library.path: in_use for library, in_use in stored_libraries()}
    assert used[built] is True
    assert used[other] is False


def test_a_cache_of_others_is_not_listed(fused, monkeypatch, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "open"))
    with pytest.raises(BuildError, match="is not yours alone"):
        stored_libraries()
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "absent"))
    assert stored_libraries() == ()
    assert not cache.folder().exists()
