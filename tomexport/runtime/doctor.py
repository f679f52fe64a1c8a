"""What this machine has: processor, packages, runtimes, devices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

from tomexport.errors import BuildError, TomexportError, plain
from tomexport.kernels import build, cache
from tomexport.runtime import fused
from tomexport.runtime.backend import Backend
from tomexport.runtime.load import BACKENDS
from tomexport.runtime.machine import machine

_PACKAGES = {
    "numpy": "", "torch": "export", "timm": "export", "onnx": "export", "onnxscript": "export",
    "safetensors": "export", "onnxruntime": "onnxruntime", "openvino": "openvino",
    "pillow": "calib",
}  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Attributes:
        machine: processor, cores, instruction sets.
        packages: name → version, or the command that installs it.
        runtimes: runtime → device → precisions; or why it does not work.
        kernels: runtime → where its fused kernels load from, or why they do not.
        tools: what builds them, and where they lie; None for what is not here.
    """

    machine: dict[str, Any]
    packages: dict[str, str]
    runtimes: dict[str, dict[str, list[str]] | str]
    kernels: dict[str, str]
    tools: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as plain JSON data."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine; needs nothing but what is installed."""
    return Diagnosis(
        machine=machine(),
        packages={name: _version(name, extra) for name, extra in _PACKAGES.items()},
        runtimes={backend.name: _devices(backend) for backend in BACKENDS},
        kernels={backend.name: _kernels(backend) for backend in BACKENDS},
        tools=build.tools() | {"cache": _cache()},
    )


def _version(package: str, extra: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: pip install 'tomexport[{extra}]'"


def _devices(backend: Backend) -> dict[str, list[str]] | str:
    if importlib.util.find_spec(backend.module) is None:
        return f"not installed: pip install 'tomexport[{backend.extra}]'"
    try:
        return {device: list(precisions) for device, precisions in backend.devices().items()}
    except (TomexportError, ImportError, RuntimeError, OSError) as err:
        return f"installed, but does not work: {plain(err)}"


def _kernels(backend: Backend) -> str:
    if importlib.util.find_spec(backend.module) is None:
        return "the runtime is not installed"
    try:
        if fused.choice(fused.AUTO, "CPU") == fused.OFF:
            return "off, as TOMEXPORT_KERNELS says"
        found = build.find(backend.name, backend.version())
        if found is None:
            return "not built yet; the first session builds them"
        backend.try_library(found.require().path)
        return f"load from {found.path}"
    except TomexportError as err:
        return str(err)
    except (ImportError, RuntimeError, OSError) as err:
        return f"the runtime does not work: {plain(err)}"


def _cache() -> str:
    try:
        return str(cache.folder())
    except BuildError as err:
        return str(err)
