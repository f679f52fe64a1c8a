"""Fused kernels in sessions: used where they can be, never needed where they cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

import tomexport
from tomexport.errors import BackendError, BuildError
from tomexport.kernels import build
from tomexport.runtime import fused as fused_sessions
from tomexport.runtime.load import BACKENDS

RUNTIMES = [backend.name for backend in BACKENDS]


@pytest.fixture
def images(natural_images):
    return natural_images(160)


@pytest.fixture
def no_build(monkeypatch):
    """Make it an error to ask for a library."""

    def refuse(*arguments):
        raise AssertionError("a library was asked for")

    monkeypatch.setattr(build, "library", refuse)


@pytest.fixture
def broken(fused, tmp_path, monkeypatch) -> Path:
    """A file that is no library, which the cache gives for one."""
    path = tmp_path / "broken.so"
    path.write_text("no library at all")
    monkeypatch.setattr(build, "library", lambda runtime, version: path)
    build.tell.cache_clear()
    return path


@pytest.fixture
def without_tools(monkeypatch, tmp_path):
    """A machine without compiler and cmake, and with an empty cache."""
    monkeypatch.delenv("TOMEXPORT_KERNELS")
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", "")
    build.tell.cache_clear()


@pytest.fixture(scope="module")
def own_ir(compiler, seeded, tmp_path_factory, kernel_cache):
    """An IR with nodes of our own, and what was said when it was made."""
    path = tmp_path_factory.mktemp("own") / "own.xml"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TOMEXPORT_KERNELS")
        patch.setenv("TOMEXPORT_CACHE", str(kernel_cache))
        return path, tomexport.export(seeded("test_vit"), "const:8", path, ops="custom")


def _library(runtime: str) -> Path:
    return build.library(runtime, BACKENDS[RUNTIMES.index(runtime)].version())


def _lines(caplog):
    return [record.getMessage() for record in caplog.records]


# ---- used where they can be


@pytest.mark.parametrize("backend", RUNTIMES)
def test_sessions_use_them_and_give_the_same(fused, files, images, backend):
    path = files / "model.onnx"
    quick = tomexport.load(path, backend, precision="f32")
    plain = tomexport.load(path, backend, precision="f32", kernels="off")
    assert (quick.kernels, plain.kernels) == (True, False)
    for image in np.split(images, len(images)):
        assert np.abs(quick(image) - plain(image)).max() < 1e-5


@pytest.mark.parametrize("backend", RUNTIMES)
def test_decisions_come_out_of_them_too(fused, files, images, backend):
    path = files / "model.onnx"
    names = BACKENDS[0].read_text(path)["metadata"].count("decision_")
    both = [
        tomexport.load(path, backend, precision="f32", kernels=kernels,
                       extra_outputs=tuple(f"decision_{i}" for i in range(names)))
        for kernels in ("auto", "off")
    ]  # fmt: skip
    quick, plain = (model.outputs(images[:1]) for model in both)
    assert len(quick) == 1 + names > 1
    for ours, theirs in zip(quick[1:], plain[1:], strict=True):
        assert (ours == theirs).all()


@pytest.mark.parametrize("backend", RUNTIMES)
def test_a_library_that_the_user_names(fused, files, images, backend, tmp_path):
    named = shutil.copy(_library(backend), tmp_path / "mine.so")
    model = tomexport.load(files / "model.onnx", backend, precision="f32", kernels=named)
    assert model.kernels
    assert np.isfinite(model(images[:1])).all()


@pytest.mark.parametrize("backend", RUNTIMES)
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_four_threads_may_call_one_session(fused, files, images, backend, kernels):
    model = tomexport.load(files / "model.onnx", backend, precision="f32", kernels=kernels)
    inputs = [images[i % len(images)][None] for i in range(40)]
    alone = [model(image) for image in inputs[: len(images)]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(model, inputs))
    for index, output in enumerate(together):
        assert np.abs(output - alone[index % len(images)]).max() < 1e-5


def test_four_processes_build_once(compiler, files, images, tmp_path, monkeypatch):
    """The real sources, real compiler and real runtime; the compiler counts its calls."""
    counter, counting = tmp_path / "calls", tmp_path / "c++"
    counting.write_text(f'#!/bin/sh\necho "$*" >> {counter}\nexec {compiler} "$@"\n')
    counting.chmod(0o755)
    monkeypatch.setenv("CXX", str(counting))
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOMEXPORT_KERNELS")
    np.save(tmp_path / "image.npy", images[:1])
    program = (
        "import sys, numpy, tomexport\n"
        "model = tomexport.load(sys.argv[1], 'onnxruntime')\n"
        "output = model(numpy.load(sys.argv[2]))\n"
        "print(model.kernels, output.argmax(), round(float(output.max()), 3))\n"
    )
    command = [sys.executable, "-c", program, files / "model.onnx", tmp_path / "image.npy"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = {process.communicate(timeout=300)[0] for process in processes}
    output = tomexport.load(files / "model.onnx", "onnxruntime", kernels="off")(images[:1])
    assert printed == {f"True {output.argmax()} {round(float(output.max()), 3)}\n"}
    compiled = [line for line in counter.read_text().splitlines() if "onnxruntime_adapter" in line]
    assert len([line for line in compiled if " -c " in line]) == 1


# ---- not needed


def test_a_portable_file_wants_none(fused, no_build, seeded, tmp_path):
    for name in ("portable.onnx", "portable.xml"):
        path = tmp_path / name
        tomexport.export(seeded("test_vit"), "const:8", path, ops="portable", verify=False)
        assert not fused_sessions.has_own_nodes(path)
        assert not tomexport.load(path).kernels


def test_a_file_of_others_wants_none(fused, no_build, tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, 1, [1, 3, 2, 2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "tomexport", values[:1], values[1:])
    path = tmp_path / "other.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", 18)]), path)  # fmt: skip
    assert not tomexport.load(path).kernels
    path.write_bytes(b"")
    assert not fused_sessions.has_own_nodes(path)


def test_off_asks_for_none(files, no_build, monkeypatch):
    for backend in RUNTIMES:
        assert not tomexport.load(files / "model.onnx", backend).kernels  # as the variable says
    monkeypatch.delenv("TOMEXPORT_KERNELS")
    assert not tomexport.load(files / "model.onnx", kernels="off").kernels


def test_other_devices_use_standard_operators(no_build, files, monkeypatch):
    monkeypatch.delenv("TOMEXPORT_KERNELS")
    seen = []
    request = fused_sessions.Request(device="CUDA")
    fused_sessions.compiled(BACKENDS[0], files / "model.onnx", request, seen.append)
    assert seen == [None]


# ---- not to be had


@pytest.mark.parametrize("backend", RUNTIMES)
def test_a_cached_library_that_does_not_load_is_replaced_by_standard_operators(
    broken, files, images, backend, caplog
):
    for _ in range(2):
        model = tomexport.load(files / "model.onnx", backend)
        assert not model.kernels
        assert np.isfinite(model(images[:1])).all()
    (line,) = _lines(caplog)
    assert f"cannot load the kernels {broken}: " in line
    assert "`tomexport kernels build` builds them anew" in line
    assert "Merging runs in standard operators" in line


def test_without_a_compiler_one_line_says_how_to_get_it(without_tools, files, images, caplog):
    for backend in (*RUNTIMES, *RUNTIMES):
        model = tomexport.load(files / "model.onnx", backend)
        assert not model.kernels
        assert np.isfinite(model(images[:1])).all()
    (line,) = _lines(caplog)
    assert "apt install g++ cmake, or pip install cmake" in line
    assert "which takes longer" in line


def test_a_damaged_file_is_not_blamed_on_the_kernels(fused, files, tmp_path, caplog):
    path = tmp_path / "cut.onnx"
    path.write_bytes((files / "model.onnx").read_bytes()[:-20000])
    assert fused_sessions.has_own_nodes(path)
    tomexport.load(files / "model.onnx", "onnxruntime")
    caplog.clear()
    with pytest.raises(BackendError, match=r"cannot load .*cut\.onnx"):
        tomexport.load(path, "onnxruntime")
    assert _lines(caplog) == []


# ---- refused


@pytest.mark.parametrize("backend", RUNTIMES)
def test_a_named_library_that_does_not_load_is_refused(files, backend, tmp_path, caplog):
    (tmp_path / "broken.so").write_text("no library at all")
    with pytest.raises(BackendError, match=r"library broken\.so does not work here\. .*: \w"):
        tomexport.load(files / "model.onnx", backend, kernels=tmp_path / "broken.so")
    assert _lines(caplog) == []


def test_a_library_for_the_other_runtime_is_refused(fused, files):
    for backend, other in zip(RUNTIMES, reversed(RUNTIMES), strict=True):
        with pytest.raises(BackendError, match="undefined symbol"):
            tomexport.load(files / "model.onnx", backend, kernels=_library(other))


@pytest.mark.parametrize(
    ("kernels", "device", "message"),
    [
        ("nowhere.so", "CPU", r"There is no library nowhere\.so\. Kernels are auto, off, or"),
        ("of", "CPU", "There is no library of"),
        ("any.so", "CUDA", "Fused kernels run on the CPU, not on CUDA"),
    ],
)
def test_requests_that_cannot_be_met(files, kernels, device, message):
    with pytest.raises(BackendError, match=message):
        tomexport.load(files / "model.onnx", device=device, kernels=kernels)


def test_the_variable_is_auto_or_off(files, monkeypatch):
    monkeypatch.setenv("TOMEXPORT_KERNELS", "no")
    with pytest.raises(BackendError, match="TOMEXPORT_KERNELS is 'no'; it can be auto or off"):
        tomexport.load(files / "model.onnx")


# ---- IR with nodes of our own


def test_such_an_ir_is_proven_and_runs(own_ir, fused, files, images):
    path, report = own_ir
    assert report.metadata.ops == "custom"
    gated = [run for run in report.verify.runs if run.gated]
    assert [(run.kernels, run.passed) for run in gated] == [(True, True)]
    model = tomexport.load(path, precision="f32")
    assert model.kernels
    plain = tomexport.load(files / "model.xml", precision="f32")
    assert not plain.kernels
    assert np.abs(model(images[:1]) - plain(images[:1])).max() < 1e-5


def test_what_it_says_of_itself_is_read_without_kernels(own_ir, no_build):
    path, report = own_ir
    assert tomexport.pipeline.describe(path) == report.metadata


def test_without_kernels_it_is_refused_with_the_reason(own_ir, broken, monkeypatch):
    path, _ = own_ir
    wanted = "has nodes of our own, and OpenVINO reads them only with fused kernels"
    with pytest.raises(BackendError, match=f"{wanted}.*cannot load the kernels"):
        tomexport.load(path)
    with pytest.raises(BackendError, match=f"{wanted}.*Fused kernels are off"):
        tomexport.load(path, kernels="off")

    def none(*arguments):
        raise BuildError("There is no compiler.")

    monkeypatch.setattr(build, "library", none)
    with pytest.raises(BackendError, match=f"{wanted}.*There is no compiler.*--ops portable"):
        tomexport.load(path)


def test_on_another_device_it_is_refused(own_ir, no_build):
    request = fused_sessions.Request(device="GPU")
    with pytest.raises(BackendError, match=r"Fused kernels run on the CPU, not on GPU"):
        fused_sessions.compiled(BACKENDS[1], own_ir[0], request, lambda library: None)
