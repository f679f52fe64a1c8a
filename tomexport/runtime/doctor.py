"""What this machine has: processor, packages, runtimes, devices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from tomexport.errors import TomexportError, plain
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
        tools: compilers on the path.
    """

    machine: dict[str, Any]
    packages: dict[str, str]
    runtimes: dict[str, dict[str, list[str]] | str]
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
        tools={name: shutil.which(name) for name in ("c++", "cmake")},
    )


def _version(package: str, extra: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: pip install 'tomexport[{extra}]'"


def _devices(backend: Any) -> dict[str, list[str]] | str:
    if importlib.util.find_spec(backend.module) is None:
        return f"not installed: pip install 'tomexport[{backend.extra}]'"
    try:
        return {device: list(precisions) for device, precisions in backend.devices().items()}
    except (TomexportError, ImportError, RuntimeError, OSError) as err:
        return f"installed, but does not work: {plain(err)}"
