"""The processor: its name, its instruction sets, its cores and which of them to use first."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# what decides the speed of matrix products: vector widths, int8 and bf16 instructions
_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16",
          "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
_SYS = Path("/sys/devices")
_PROC = Path("/proc")


def machine() -> dict[str, Any]:
    """Return what is known of the processor; None where the system does not tell."""
    pairs = (line.partition(":") for line in _read(_PROC / "cpuinfo").splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    cpus = usable_cpus()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": fields.get("model name") or platform.processor() or "unknown",
        "cores": len(cpus),
        "core_kinds": core_kinds() or None,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "governor": _read(_cpu(cpus[0]) / "cpufreq/scaling_governor") or None,
        "mhz": fields.get("cpu MHz"),
    }


def int8_instructions() -> tuple[str, ...]:
    """Return the processor's instructions for sums of int8 products, if it is known to have any."""
    known = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp", "sve")
    return tuple(flag for flag in known if flag in machine()["flags"])


def needs_7_bits() -> bool:
    """Tell whether sums of int8 products saturate here: on x86 without instructions for them."""
    return platform.machine().lower() in ("x86_64", "amd64") and not int8_instructions()


def usable_cpus() -> list[int]:
    """Return the CPUs that this process may use: fast cores first, cores' second threads last."""
    usable = getattr(os, "sched_getaffinity", None)
    kinds = list(core_kinds().values())

    def order(cpu: int) -> tuple[int, int, int]:
        kind = next((i for i, cpus in enumerate(kinds) if cpu in cpus), len(kinds))
        threads = _numbers(_read(_cpu(cpu) / "topology/thread_siblings_list"))
        return kind, threads.index(cpu) if cpu in threads else 0, cpu

    return sorted(usable(0) if usable else range(os.cpu_count() or 1), key=order)


def core_kinds() -> dict[str, list[int]]:
    """Return the CPUs of each kind of core, the fastest first; empty if all are of one kind."""
    hybrid = {"P": "cpu_core", "E": "cpu_atom"}
    kinds = {kind: _numbers(_read(_SYS / name / "cpus")) for kind, name in hybrid.items()}
    if any(kinds.values()):
        return {kind: cpus for kind, cpus in kinds.items() if cpus}
    by_speed: dict[int, list[int]] = {}
    for file in (_SYS / "system/cpu").glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        by_speed.setdefault(int(_read(file) or 0), []).append(int(file.parts[-3][3:]))
    if len(by_speed) < 2:
        return {}
    return {f"{khz // 1000} MHz": sorted(by_speed[khz]) for khz in sorted(by_speed, reverse=True)}


def _cpu(number: int) -> Path:
    return _SYS / f"system/cpu/cpu{number}"


def _numbers(text: str) -> list[int]:
    """Read a list as the kernel writes it: "0-3,8" is 0, 1, 2, 3, 8."""
    spans = [span.split("-") for span in text.split(",") if span]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
