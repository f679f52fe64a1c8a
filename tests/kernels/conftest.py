"""A stand-in for the C++ sources: quick to build, and it counts how often it was."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tomexport.kernels import build

_PROJECT = """\
cmake_minimum_required(VERSION 3.18)
project(stand_in NONE)
file(APPEND "{builds}" "${{TOMEXPORT_RUNTIME}} ${{TOMEXPORT_MARCH}}\\n")
if(DEFINED ENV{{SLOW}})
  execute_process(COMMAND ${{CMAKE_COMMAND}} -E sleep $ENV{{SLOW}})
endif()
if(DEFINED ENV{{BROKEN}})
  message(FATAL_ERROR "It is broken, they say.")
endif()
file(WRITE ${{CMAKE_BINARY_DIR}}/version 9.8)
file(WRITE ${{CMAKE_BINARY_DIR}}/libtomexport_${{TOMEXPORT_RUNTIME}}.so "a library")
"""
_PROGRAM = """\
import sys
from pathlib import Path
from tomexport.kernels import build
build.KERNELS = Path(sys.argv[1])
print(build.library("onnxruntime", "1.2.3"))
"""


@dataclass(frozen=True)
class StandIn:
    """Sources of kernels, and the cache that they are built into."""

    sources: Path
    cache: Path
    log: Path

    def builds(self) -> list[str]:
        """Return a line for each time that they were built."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def start(self) -> subprocess.Popen[str]:
        """Ask for the library in a process of its own."""
        command = [sys.executable, "-c", _PROGRAM, str(self.sources)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def leftovers(self) -> list[str]:
        """Return the hidden folders in the cache."""
        return [path.name for path in self.cache.glob(".*") if path.is_dir()]


@pytest.fixture
def stand_in(compiler, tmp_path, monkeypatch) -> StandIn:
    made = StandIn(tmp_path / "kernels", tmp_path / "cache", tmp_path / "builds.log")
    (made.sources / "native").mkdir(parents=True)
    (made.sources / "native/CMakeLists.txt").write_text(_PROJECT.format(builds=made.log))
    (made.sources / "kernel.h").write_text("// one\n")
    monkeypatch.setattr(build, "KERNELS", made.sources)
    monkeypatch.setenv("TOMEXPORT_CACHE", str(made.cache))
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_TOOLCHAIN_FILE"):
        monkeypatch.delenv(name, raising=False)
    build.tell.cache_clear()
    return made
