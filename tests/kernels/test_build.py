"""The library of fused kernels: built once, whole or not at all, anew when anything changes."""

from __future__ import annotations

import os
import platform
import signal
import time
import zipfile
from pathlib import Path

import pytest

from tomexport.errors import BuildError
from tomexport.kernels import build, cache
from tomexport.kernels.build import Target
from tomexport.runtime.openvino_backend import OpenVino

ROOT = Path(__file__).parents[2]
NAME = "libtomexport_onnxruntime.so"


def _library() -> Path:
    return build.library("onnxruntime", "1.2.3")


# ---- once


def test_it_is_built_once_with_one_line_on_stderr(stand_in, caplog):
    first = _library()
    assert first.name == NAME
    assert first.read_text() == "a library"
    assert first.parent.parent == stand_in.cache
    assert _library() == first
    assert stand_in.builds() == ["onnxruntime native"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "building fused kernels for onnxruntime 1.2.3, once" in lines[0]
    assert stand_in.leftovers() == []


def test_the_line_goes_to_stderr_where_nothing_is_configured(stand_in):
    with stand_in.start() as process:
        out, err = process.communicate(timeout=60)
    assert out.strip() == str(_library())
    assert err.count("\n") == 1
    assert err.startswith("tomexport: building fused kernels for onnxruntime 1.2.3")


def test_the_record_says_what_it_is(stand_in):
    path = _library()
    (found,) = cache.stored()
    assert found == build.find("onnxruntime", "1.2.3")
    assert found.path == path
    assert (found.runtime, found.version, found.march) == ("onnxruntime", "1.2.3", "native")
    assert found.size == len("a library")
    assert found.error is None
    assert found.to_dict()["path"] == str(path)


def test_find_builds_nothing(stand_in):
    assert build.find("onnxruntime", "1.2.3") is None
    assert stand_in.builds() == []
    assert not stand_in.cache.exists()


def _compiler(stand_in, version: str) -> Path:
    path = stand_in.sources.parent / "c++"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def _change_sources(stand_in, patch):
    (stand_in.sources / "kernel.h").write_text("// two\n")


def _add_source(stand_in, patch):
    (stand_in.sources / "other.h").write_text("// one\n")


def _change_compiler(stand_in, patch):
    patch.setenv("CXX", str(_compiler(stand_in, "12.3.0")))


def _change_processor(stand_in, patch):
    patch.setattr(build, "_processor", lambda: "flags: sse2")


def _change_machine(stand_in, patch):
    patch.setattr(platform, "machine", lambda: "aarch64")


def _change_flags(stand_in, patch):
    patch.setenv("CXXFLAGS", "-O1")


CHANGES = [
    _change_sources, _add_source, _change_compiler, _change_processor, _change_machine,
    _change_flags,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_it_is_built_anew(stand_in, monkeypatch, change):
    before = _library()
    change(stand_in, monkeypatch)
    assert _library() != before
    assert len(stand_in.builds()) == 2


def test_a_new_version_of_the_compiler_counts(stand_in, monkeypatch):
    monkeypatch.setenv("CXX", str(_compiler(stand_in, "12.2.0")))
    before = _library()
    _compiler(stand_in, "12.3.0")
    assert _library() != before


def test_each_release_of_each_runtime_has_its_own(stand_in):
    wanted = [("onnxruntime", "1.2.3"), ("onnxruntime", "1.2.4"), ("openvino", "1.2.3")]
    assert len({build.library(*one) for one in wanted}) == 3


def test_the_processor_is_part_of_what_native_means():
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc/cpuinfo here")
    assert "flags" in build._processor() or "Features" in build._processor()


# ---- several processes, and those that die


def test_four_processes_at_once_build_once(stand_in, monkeypatch):
    monkeypatch.setenv("SLOW", "0.5")
    processes = [stand_in.start() for _ in range(4)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert paths == {str(_library())}
    assert len(stand_in.builds()) == 1
    assert stand_in.leftovers() == []


def test_a_killed_build_breaks_nothing(stand_in, monkeypatch):
    monkeypatch.setenv("SLOW", "2")
    with stand_in.start() as process:
        deadline = time.monotonic() + 60
        while not stand_in.builds() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert stand_in.leftovers()
    assert cache.stored() == ()
    monkeypatch.delenv("SLOW")
    assert _library().read_text() == "a library"
    assert stand_in.leftovers() == []


@pytest.mark.parametrize("part", [NAME, "tomexport-kernels.json"])
def test_what_was_cut_is_built_anew(stand_in, part):
    path = _library()
    file = path.parent / part
    file.write_bytes(file.read_bytes()[:-1])
    assert _library().read_text() == "a library"
    assert len(stand_in.builds()) == 2


# ---- builds that fail


def test_a_failure_is_remembered_with_its_reason(stand_in, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    for _ in range(2):
        with pytest.raises(BuildError, match=r"not be built: .*It is broken, they say") as err:
            _library()
    assert len(stand_in.builds()) == 1
    (failed,) = cache.stored()
    log = failed.path.parent / "build.log"
    assert str(log) in str(err.value)
    assert "It is broken" in log.read_text()

    with pytest.raises(BuildError, match="`tomexport kernels build` tries again"):
        build.build(Target("onnxruntime", "1.2.3"))
    assert len(stand_in.builds()) == 2
    monkeypatch.delenv("BROKEN")
    made = build.build(Target("onnxruntime", "1.2.3"))
    assert _library() == made.path
    assert len(cache.stored()) == 1


def test_the_first_error_of_the_compiler_is_shown(stand_in):
    (stand_in.sources / "native/CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(broken CXX)\n"
        "add_library(tomexport_onnxruntime MODULE broken.cpp)\n"
    )
    (stand_in.sources / "native/broken.cpp").write_text("int one = nothing;\nint two = nobody;\n")
    with pytest.raises(BuildError, match=r"broken\.cpp:1:11: error: .nothing. was not declared"):
        _library()


@pytest.mark.parametrize(
    ("languages", "message"),
    [("CXX", r"The C\+\+ compiler .* is not able to compile"), ("NONE", "finished without a lib")],
)
def test_tools_that_build_nothing(stand_in, monkeypatch, languages, message):
    (stand_in.sources / "native/CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.18)\nproject(any {languages})\n"
    )
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match=message):
        _library()


def test_without_compiler_and_cmake_it_says_how_to_get_them(stand_in, monkeypatch):
    monkeypatch.setenv("PATH", "")
    wanted = r"for want of c\+\+ and cmake: apt install g\+\+ cmake, or pip install cmake"
    for call in (_library, lambda: build.build(Target("openvino", "1"))):
        with pytest.raises(BuildError, match=wanted):
            call()
    assert not stand_in.cache.exists()


def test_the_cmake_of_pip_is_found_beside_python(stand_in, monkeypatch, tmp_path):
    cmake = build.tools()["cmake"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cmake").symlink_to(cmake)
    monkeypatch.setattr(build.sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setenv("PATH", "")
    assert build.tools()["cmake"] == str(tmp_path / "bin/cmake")


# ---- for another machine


def test_out_is_one_file_with_a_name_that_says_what_it_is_for(stand_in, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o777)
    made = build.build(Target("onnxruntime", "1.2.3", "armv8.2-a"), out)
    assert made.path == out / "libtomexport_onnxruntime-1.2.3-armv8.2-a.so"
    assert [file.name for file in out.iterdir()] == [made.path.name]
    assert stand_in.builds() == ["onnxruntime armv8.2-a"]
    assert cache.stored() == ()


def test_a_toolchain_says_the_release(stand_in, tmp_path):
    toolchain = tmp_path / "arm.cmake"
    toolchain.write_text("set(CMAKE_SYSTEM_NAME Linux)\n")
    made = build.build(Target("openvino", None, "armv8-a", toolchain), tmp_path)
    assert made.path.name == "libtomexport_openvino-9.8-armv8-a.so"
    assert made.compiler == str(toolchain)


def test_a_toolchain_needs_the_openvino_of_the_other_machine(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    toolchain = tmp_path / "arm.cmake"
    toolchain.write_text("")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BuildError, match="must set CMAKE_PREFIX_PATH or OpenVINO_DIR"):
        build.build(Target("openvino", None, "armv8-a", toolchain), out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "out", "message"),
    [
        (Target("openvino", "1", "armv8-a"), None, "for this machine only.*--out DIR"),
        (Target("openvino", None, toolchain=Path("x")), None, "for this machine only"),
        (Target("openvino", "1"), Path("nowhere"), "no folder nowhere for the library"),
        (Target("openvino", None, toolchain=Path("x")), Path(), "There is no toolchain file x"),
        (Target("openvino", "1", "a;b"), Path(), "'a;b' is no architecture"),
        (Target("openvino", "1", ""), Path(), "'' is no architecture"),
    ],
)
def test_requests_that_cannot_be_met(stand_in, tmp_path, monkeypatch, target, out, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match=message):
        build.build(target, out)
    assert stand_in.builds() == []


# ---- the real sources


def test_the_wheel_carries_all_that_is_compiled(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as file:
        carried = {name for name in file.namelist() if name.startswith("tomexport/kernels/")}
    kernels = ROOT / "tomexport/kernels"
    sources = {
        str(path.relative_to(ROOT))
        for path in kernels.rglob("*")
        if path.is_file() and path.suffix in (".h", ".cpp", ".txt")
    }
    assert {kernels.name + "/native/CMakeLists.txt", "kernels/merge/kernel.h"} <= {
        name.removeprefix("tomexport/") for name in sources
    }
    assert sources <= carried


def test_a_library_does_not_look_for_openvino_where_it_was_built(fused):
    import openvino

    library = build.library("openvino", OpenVino().version())
    libraries = Path(openvino.__file__).parent / "libs"
    assert libraries.is_dir()
    assert os.fsencode(libraries) not in library.read_bytes()
