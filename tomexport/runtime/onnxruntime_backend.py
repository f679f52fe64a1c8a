"""ONNX Runtime. Nodes of our domain run as fused kernels, or as the functions in the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tomexport.artifact import DOMAIN
from tomexport.errors import BackendError, need, plain
from tomexport.runtime import fused
from tomexport.runtime.backend import Array, OperatorTime, Request, check_device

_PROVIDERS = {
    "CPU": "CPUExecutionProvider",
    "CUDA": "CUDAExecutionProvider",
    "TENSORRT": "TensorrtExecutionProvider",
}


@dataclass(frozen=True)
class _Session:
    _session: Any
    _outputs: tuple[str, ...]
    input_shape: tuple[int | None, ...]
    kernels: bool
    precision: str = "f32"

    def run(self, images: Array) -> list[Array]:
        name = self._session.get_inputs()[0].name
        outputs: list[Array] = self._session.run(list(self._outputs), {name: images})
        return outputs

    def operators(self) -> list[OperatorTime]:
        """Read the profile of the calls so far; what is ours carries our domain in its name."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        starts = sorted(e["ts"] for e in events if e["name"] == "model_run")
        start, calls = starts[len(starts) // 4], len(starts) - len(starts) // 4  # the first warm up
        nodes = (
            (event["args"]["op_name"], DOMAIN in event["name"], event["dur"])
            for event in events
            if event["name"].endswith("_kernel_time") and event["ts"] >= start
        )
        return OperatorTime.sum_up(nodes, calls)


@dataclass(frozen=True)
class OnnxRuntime:
    """Runs .onnx files in float32."""

    name: str = "onnxruntime"
    module: str = "onnxruntime"
    extra: str = "onnxruntime"
    suffixes: tuple[str, ...] = (".onnx",)

    def version(self) -> str:
        """Return the release that is installed."""
        return str(need(self.module, self.extra).__version__)

    def devices(self) -> dict[str, tuple[str, ...]]:
        """Return the devices whose execution provider is there."""
        available = need(self.module, self.extra).get_available_providers()
        return {name: ("f32",) for name, ep in _PROVIDERS.items() if ep in available}

    def read_text(self, path: Path) -> dict[str, str]:
        """Return our entries of the file's metadata_props."""
        onnx = need("onnx", self.extra)
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as err:
            raise BackendError(f"{path} is not a readable ONNX file ({plain(err)}).") from err
        prefix = f"{DOMAIN}."
        entries = {prop.key: prop.value for prop in model.metadata_props}
        return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}

    def compile(self, path: Path, request: Request) -> _Session:
        """Make a session; with extra outputs, of a graph that returns them as well."""
        check_device(self, request)
        return fused.compiled(self, path, request, partial(self._compile, path, request))

    def try_library(self, library: Path) -> None:
        """Load a library of fused kernels, to see whether it loads.

        Raises: BackendError if it does not.
        """
        self._options(library)

    def _options(self, library: Path | None) -> Any:
        options = need(self.module, self.extra).SessionOptions()
        options.log_severity_level = 3  # errors only
        if library is None:
            return options
        try:
            options.register_custom_ops_library(str(library))
        except Exception as err:
            raise BackendError(fused.cannot_load(self, library, err)) from err
        return options

    def _compile(self, path: Path, request: Request, library: Path | None) -> _Session:
        provider, extra = _PROVIDERS[request.device], request.extra_outputs
        options = self._options(library)
        if request.threads is not None:
            options.intra_op_num_threads = request.threads
        if request.profile_into:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(request.profile_into) / "profile")
        # where a graph that travels as bytes finds weights of its own file's second part
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
        )
        try:
            model = _with_outputs(path, extra) if extra else str(path)
            session = need(self.module, self.extra).InferenceSession(
                model, options, providers=[provider]
            )
        except Exception as err:
            raise BackendError(f"ONNX Runtime cannot load {path}: {plain(err)}") from err
        if provider not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime lists {request.device} but could not start it, and fell back to "
                f"{', '.join(session.get_providers())}. Check the driver, or use --device CPU."
            )
        outputs = (session.get_outputs()[0].name, *extra)
        shape = tuple(d if isinstance(d, int) else None for d in session.get_inputs()[0].shape)
        return _Session(session, outputs, shape, library is not None)


def _with_outputs(path: Path, names: Sequence[str]) -> Any:
    """Return the model, as bytes, with values inside the graph as further outputs."""
    onnx = need("onnx", "onnxruntime")
    model = onnx.load(path, load_external_data=False)
    given = {output.name for output in model.graph.output}  # a traced file gives them anyway
    for name in names:
        if name not in given:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return model.SerializeToString()
