"""What is read of the processor, on machines made of files."""

from __future__ import annotations

import os

import pytest

from tomexport.runtime import machine as module
from tomexport.runtime.machine import (
    core_kinds,
    int8_instructions,
    machine,
    needs_7_bits,
    usable_cpus,
)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Give a function that writes what the kernel would tell of a machine."""
    monkeypatch.setattr(module, "_SYS", tmp_path / "sys")
    monkeypatch.setattr(module, "_PROC", tmp_path / "proc")

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def _usable(monkeypatch, *cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus), raising=False)


def test_hybrid_processors_use_a_thread_of_each_fast_core_first(system, monkeypatch):
    system(sys__cpu_core__cpus="0-3", sys__cpu_atom__cpus="4-5")
    siblings = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5"}
    for cpu, text in siblings.items():
        system(**{f"sys__system__cpu__cpu{cpu}__topology__thread_siblings_list": text})
    _usable(monkeypatch, *range(6))
    assert core_kinds() == {"P": [0, 1, 2, 3], "E": [4, 5]}
    assert usable_cpus() == [0, 2, 1, 3, 4, 5]
    _usable(monkeypatch, 1, 4, 5)
    assert usable_cpus() == [1, 4, 5]


def test_kinds_by_frequency_where_the_system_has_no_names(system, monkeypatch):
    for cpu, khz in enumerate([1_800_000, 1_800_000, 2_400_000, 2_400_000]):
        system(**{f"sys__system__cpu__cpu{cpu}__cpufreq__cpuinfo_max_freq": khz})
    _usable(monkeypatch, 0, 1, 2, 3)
    assert core_kinds() == {"2400 MHz": [2, 3], "1800 MHz": [0, 1]}
    assert usable_cpus() == [2, 3, 0, 1]


def test_what_a_machine_tells(system, monkeypatch):
    system(proc__cpuinfo="model name : Quick 9000\nflags : fpu avx2 amx_int8\ncpu MHz : 2600.0")
    system(sys__system__cpu__cpu1__cpufreq__scaling_governor="powersave")
    _usable(monkeypatch, 1)
    found = machine()
    assert found["cpu"] == "Quick 9000"
    assert found["flags"] == ["avx2", "amx_int8"]
    assert (found["cores"], found["governor"], found["mhz"]) == (1, "powersave", "2600.0")


def test_a_system_that_tells_nothing(system, monkeypatch):
    system()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    found = machine()
    assert found["cores"] == os.cpu_count()
    assert (found["core_kinds"], found["governor"], found["flags"]) == (None, None, [])


def test_int8_instructions(system, monkeypatch):
    _usable(monkeypatch, 0)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    system(proc__cpuinfo="flags : avx2 avx512f")
    assert int8_instructions() == ()
    assert needs_7_bits()
    system(proc__cpuinfo="flags : avx2 avx_vnni")
    assert int8_instructions() == ("avx_vnni",)
    assert not needs_7_bits()
    system(proc__cpuinfo="flags : avx2")
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert not needs_7_bits()
