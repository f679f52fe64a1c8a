"""The one-way flow of imports, and what must load without the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tomexport

PACKAGE = Path(tomexport.__file__).parent
# each layer may import those before it; exporter and runtime stand side by side
ORDER = [
    "errors|quiet|scratch", "plan", "artifact", "kernels", "exporter|runtime", "delivery",
    "pipeline", "calib", "chart|tables", "options|terminal", "cli",
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split("|")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tomexport" and len(parts) > 1 else None


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "tomexport":
                found |= {f"tomexport.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own in ("__init__", "__main__"):
        return
    for module in _imports(path):
        other = _layer(module)
        if other is None or other == own or other.startswith("__"):
            continue
        assert LEVEL[other] < LEVEL[own], f"{own} must not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_runtime_files_name_no_exporting_library(path):
    if path.relative_to(PACKAGE).parts[0] in ("runtime", "errors.py", "plan.py", "artifact.py"):
        names = {module.split(".")[0] for module in _imports(path)}
        assert not names & {"torch", "timm", "onnxscript", "onnx_ir", "jaxtyping"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "runtime").glob("*.py")), ids=lambda p: p.name)
def test_the_runtime_knows_libraries_but_no_operators(path):
    kernels = {name for name in _imports(path) if _layer(name) == "kernels"}
    assert kernels <= {f"tomexport.kernels{end}" for end in ("", ".build", ".cache")}


def _loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return set(output.stdout.decode().split())


@pytest.mark.parametrize(
    "code",
    [
        "import tomexport",
        "import tomexport; tomexport.Schedule.parse('exp:0.25,0')",
        "import tomexport.cli",
        "import tomexport.runtime.verify, tomexport.runtime.doctor",
        "import tomexport; tomexport.load; tomexport.verify; tomexport.profile; tomexport.search",
        "import tomexport.kernels, tomexport.kernels.build, tomexport.runtime.libraries",
    ],
)
def test_light_modules_stay_light(code):
    assert not _loaded(code) & {"torch", "timm", "onnxscript", "onnx_ir", "onnxruntime", "openvino"}
