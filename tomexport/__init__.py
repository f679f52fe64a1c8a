"""Token-reduced vision transformers, exported to ONNX and OpenVINO and proven equal to PyTorch.

Usage:
    import tomexport

    tomexport.export("model.pth", "exp:0.25,0", "model.onnx")
    model = tomexport.load("model.onnx")
    logits = model(images)  # (B, 3, H, W) float32 → (B, classes) float32
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# loads the submodule now, so that the function of the same name can stand in its place below
from tomexport.plan import Plan, Schedule

if TYPE_CHECKING:
    from tomexport.calib.search.search import search
    from tomexport.pipeline import export, plan, reduce
    from tomexport.runtime.load import load
    from tomexport.runtime.profile import profile
    from tomexport.runtime.verify import verify

__version__ = "0.1.0"

__all__ = ["Plan", "Schedule", "plan", "reduce", "export", "load", "verify", "profile", "search"]

_HOMES = {
    "plan": "tomexport.pipeline",
    "reduce": "tomexport.pipeline",
    "export": "tomexport.pipeline",
    "load": "tomexport.runtime.load",
    "verify": "tomexport.runtime.verify",
    "profile": "tomexport.runtime.profile",
    "search": "tomexport.calib.search.search",
}
del plan


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tomexport' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
