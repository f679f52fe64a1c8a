"""`doctor`: what is here, what loads, and why not; it builds nothing."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from tomexport.kernels import build
from tomexport.runtime import doctor
from tomexport.runtime.doctor import diagnose
from tomexport.runtime.load import BACKENDS

RUNTIMES = [backend.name for backend in BACKENDS]


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """An empty cache, with kernels wanted."""
    monkeypatch.delenv("TOMEXPORT_KERNELS", raising=False)
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_kernels_that_load(fused):
    expected = {
        backend.name: f"load from {build.library(backend.name, backend.version())}"
        for backend in BACKENDS
    }
    assert diagnose().kernels == expected


def test_kernels_that_are_not_built_yet(compiler, empty):
    assert diagnose().kernels == dict.fromkeys(
        RUNTIMES, "not built yet; the first session builds them"
    )
    assert diagnose().tools["cache"] == str(empty)
    assert not empty.exists()


def test_kernels_that_cannot_be_built(empty, monkeypatch):
    monkeypatch.setenv("PATH", "")
    diagnosis = diagnose()
    for name in RUNTIMES:
        assert "for want of c++ and cmake" in diagnosis.kernels[name]
    assert (diagnosis.tools["c++"], diagnosis.tools["cmake"]) == (None, None)


def test_kernels_that_failed_or_do_not_load(fused, empty, monkeypatch):
    """A cache of one library that is none, and of one failure."""
    monkeypatch.setenv("TOMEXPORT_CACHE", str(fused))
    library = build.library("onnxruntime", BACKENDS[0].version())
    entry = shutil.copytree(library.parent, empty / library.parent.name)
    empty.chmod(0o700)
    monkeypatch.setenv("TOMEXPORT_CACHE", str(empty))
    broken = entry / library.name
    content = b"no library at all".ljust(broken.stat().st_size)
    broken.unlink()
    broken.write_bytes(content)
    broken.chmod(0o700)
    assert f"cannot load the kernels {broken}: " in diagnose().kernels["onnxruntime"]

    record = entry / "tomexport-kernels.json"
    record.write_text(record.read_text().replace('"error": null', '"error": "no luck"'))
    assert "could not be built: no luck. The log is" in diagnose().kernels["onnxruntime"]


def test_a_cache_of_others_is_named(compiler, empty):
    empty.mkdir()
    empty.chmod(0o777)
    diagnosis = diagnose()
    for words in (*diagnosis.kernels.values(), diagnosis.tools["cache"]):
        assert f"{empty} is not yours alone" in words


def test_kernels_that_are_off(fused, monkeypatch):
    monkeypatch.setenv("TOMEXPORT_KERNELS", "off")
    assert diagnose().kernels == dict.fromkeys(RUNTIMES, "off, as TOMEXPORT_KERNELS says")


def test_runtimes_that_are_not_installed(fused, monkeypatch):
    absent = tuple(dataclasses.replace(backend, module="absent_runtime") for backend in BACKENDS)
    monkeypatch.setattr(doctor, "BACKENDS", absent)
    assert diagnose().kernels == dict.fromkeys(RUNTIMES, "the runtime is not installed")
