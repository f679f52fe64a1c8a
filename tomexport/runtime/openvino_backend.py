"""OpenVINO: runs .onnx and .xml files, and writes IR.

With fused kernels as an extension it reads nodes of our own as they are. It never expands the
functions of an ONNX file, so without kernels they are inlined before it reads one.
"""

from __future__ import annotations

import contextlib
import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tomexport import scratch
from tomexport.artifact import DOMAIN
from tomexport.errors import BackendError, ExportError, need, plain
from tomexport.runtime import fused, openvino_graph
from tomexport.runtime.backend import Array, OperatorTime, Request, check_device

_CAPABILITIES = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}
_TYPES = {"f32": "f32", "float32": "f32", "bf16": "bf16", "bfloat16": "bf16", "f16": "f16"}


@dataclass(frozen=True)
class _Session:
    _compiled: Any
    _outputs: tuple[int, ...]
    input_shape: tuple[int | None, ...]
    precision: str
    kernels: bool
    _own: threading.local = field(default_factory=threading.local, repr=False)

    def run(self, images: Array) -> list[Array]:
        if not hasattr(self._own, "request"):  # a request serves one thread at a time
            self._own.request = self._compiled.create_infer_request()
        results = self._own.request.infer(images, share_inputs=True)
        # a copy, because the next call writes into the same memory
        return [np.array(results[i]) for i in self._outputs]

    def operators(self) -> list[OperatorTime]:
        """Read the mean of the calls so far; what is ours carries our domain in its name."""
        ours = _merging(self._compiled.get_runtime_model())
        nodes = (
            (info.node_type, info.node_name in ours, info.real_time.total_seconds() * 1e6)
            for info in self._compiled.create_infer_request().profiling_info
            if info.status == info.status.EXECUTED
        )
        return OperatorTime.sum_up(nodes, calls=1)


@dataclass(frozen=True)
class OpenVino:
    """Runs .onnx and .xml files; without a word it computes in the device's own precision."""

    name: str = "openvino"
    module: str = "openvino"
    extra: str = "openvino"
    suffixes: tuple[str, ...] = (".onnx", ".xml")

    def version(self) -> str:
        """Return the release and build that is installed."""
        return "-".join(need(self.module, self.extra).__version__.split("-")[:2])

    def devices(self) -> dict[str, tuple[str, ...]]:
        """Return the devices of this machine and the precisions that each reports."""
        core = need(self.module, self.extra).Core()
        found = {}
        for device in core.available_devices:
            capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
            found[device] = tuple(p for c, p in _CAPABILITIES.items() if c in capabilities)
        return found

    def read_text(self, path: Path) -> dict[str, str]:
        """Return our entries of the file's rt_info, or of its metadata_props."""
        if path.suffix == ".onnx":
            from tomexport.runtime.onnxruntime_backend import OnnxRuntime

            return OnnxRuntime().read_text(path)
        try:  # as text, which needs no kernels
            entries = ET.parse(path).getroot().find(f"rt_info/{DOMAIN}")
        except (ET.ParseError, OSError, ValueError, LookupError) as err:
            raise BackendError(f"{path} is not a readable IR file ({err}).") from err
        return {} if entries is None else {e.tag: e.get("value", "") for e in entries}

    def try_library(self, library: Path) -> None:
        """Load a library of fused kernels, to see whether it loads.

        Raises: BackendError if it does not.
        """
        self._core(library)

    def _core(self, library: Path | None) -> Any:
        core = need(self.module, self.extra).Core()
        if library is None:
            return core
        try:
            core.add_extension(str(library))
        except Exception as err:
            raise BackendError(fused.cannot_load(self, library, err)) from err
        return core

    def _read(self, core: Any, path: Path, library: Path | None) -> Any:
        try:
            if library or path.suffix != ".onnx":
                return core.read_model(path)
            with _inlined(path) as readable:
                return core.read_model(readable)
        except Exception as err:
            why = _cut_off(path) if path.suffix == ".xml" else ""
            raise BackendError(f"OpenVINO cannot read {path}: {why or plain(err)}") from err

    def compile(self, path: Path, request: Request) -> _Session:
        """Compile the file for a device, tuned for the latency of one call."""
        check_device(self, request)
        return fused.compiled(self, path, request, partial(self._compile, path, request))

    def _compile(self, path: Path, request: Request, library: Path | None) -> _Session:
        core = self._core(library)
        model = self._read(core, path, library)
        extra = request.extra_outputs
        if extra:
            model.add_outputs(list(extra))  # a traced file has them already
        names = [output.get_names() for output in model.outputs]
        outputs = (0, *(next(i for i, n in enumerate(names) if name in n) for name in extra))
        hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if request.precision is not None:
            hints["INFERENCE_PRECISION_HINT"] = request.precision
        if request.threads is not None:
            hints["INFERENCE_NUM_THREADS"] = request.threads
        if request.profile_into:
            hints["PERF_COUNT"] = True
        try:
            if library:
                bfloat16 = self._precision(core, request) == "bf16"
                openvino_graph.prepare(model, library, bfloat16=bfloat16)
            compiled = core.compile_model(model, request.device, hints)
        except Exception as err:
            raise BackendError(
                f"OpenVINO cannot compile {path} for {request.device}: {plain(err)}"
            ) from err
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        shape = tuple(
            dim.get_length() if dim.is_static else None
            for dim in compiled.inputs[0].get_partial_shape()
        )
        return _Session(compiled, outputs, shape, _TYPES.get(used, used), library is not None)

    @staticmethod
    def _precision(core: Any, request: Request) -> str:
        if request.precision is not None:
            return request.precision
        used: str = core.get_property(request.device, "INFERENCE_PRECISION_HINT").to_string()
        return _TYPES.get(used, used)

    def library(self) -> Path:
        """Return the library of fused kernels, without which no nodes of our own can be read.

        Raises: BuildError or BackendError if there is none.
        """
        return fused.library(self, Request(kernels=fused.choice(fused.AUTO, "CPU")))

    def save_ir(self, onnx_path: Path, xml_path: Path, *, half: bool, text: dict[str, str]) -> None:
        """Convert an .onnx file to IR with our entries in its rt_info.

        Args:
            onnx_path: the graph; nodes of our own need the fused kernels.
            xml_path: where the .xml goes; the .bin goes beside it.
            half: store weights as float16.
            text: what to write into rt_info, by key.

        Raises: ExportError if the files could not be written whole, BuildError or BackendError if
            there are no kernels.
        """
        self.write(self.read(onnx_path), xml_path, half=half, text=text)

    def read(self, path: Path) -> Any:
        """Read a file as an openvino.Model, nodes of our own as they are.

        Raises: BackendError if it cannot be read, BuildError or BackendError if it has nodes of
            our own and there are no kernels, which IR and .onnx need alike here.
        """
        kernels = self.library() if fused.has_own_nodes(path) else None
        return self._read(self._core(kernels), path, kernels)

    def write(self, model: Any, xml_path: Path, *, half: bool, text: dict[str, str]) -> None:
        """Write a model as IR with our entries in its rt_info; see `save_ir`."""
        ov = need(self.module, self.extra)
        for key, value in text.items():
            model.set_rt_info(value, [DOMAIN, key])
        try:
            ov.save_model(model, xml_path, compress_to_fp16=half)
        except Exception as err:
            raise ExportError(
                f"OpenVINO could not write {xml_path.name} ({plain(err)}); the disk may be full. "
                "Nothing was kept."
            ) from err
        _require_whole(xml_path)


def _require_whole(xml_path: Path) -> None:
    """Check that the .bin is as long as the .xml says: OpenVINO does not notice a full disk."""
    graph = xml_path.read_text(encoding="utf-8", errors="replace")
    ends = [
        int(offset) + int(size)
        for offset, size in re.findall(r'offset="(\d+)"[^>]*? size="(\d+)"', graph)
    ]
    expected, found = max(ends, default=0), xml_path.with_suffix(".bin").stat().st_size
    if found < expected or not graph.rstrip().endswith("</net>"):
        raise ExportError(
            f"The IR was not written whole ({found} of {expected} bytes of weights); "
            "the disk may be full. Nothing was kept."
        )


def _merging(graph: Any) -> set[str]:
    """Return the nodes of a compiled graph that are ours.

    A node that OpenVINO put in, named by its type and a number, is ours if all that read it are.
    """
    ours: set[str] = set()
    for node in reversed(graph.get_ordered_ops()):
        name = node.get_friendly_name()
        inputs = (i for output in node.outputs() for i in output.get_target_inputs())
        readers = {i.get_node().get_friendly_name() for i in inputs}
        readers = {reader for reader in readers if "stub_" not in reader}  # read by none
        put_in = readers and re.fullmatch(r"[A-Za-z]+_\d+", name)
        if DOMAIN in name or (put_in and readers <= ours):
            ours.add(name)
    return ours


@contextlib.contextmanager
def _inlined(path: Path) -> Iterator[Path | bytes]:
    """Give what `read_model` takes of an .onnx file, with its functions expanded.

    Bytes, but where the weights lie in a second file: then, for the moment, a file beside it.
    """
    onnx = need("onnx", "openvino")
    model = onnx.load(path, load_external_data=False)
    if not model.functions:
        yield path
        return
    from onnx import inliner

    model = inliner.inline_local_functions(model)
    outside = [w for w in model.graph.initializer if w.data_location == w.EXTERNAL]
    content = model.SerializeToString()
    if not outside:
        del model  # as large as the content
        yield content
        return
    with scratch.folder(path) as folder:
        for weights in outside:
            for entry in weights.external_data:
                part = folder / Path(entry.value).name
                if entry.key == "location" and not part.exists():
                    part.hardlink_to(path.parent / entry.value)  # OpenVINO follows no other link
        graph = folder / path.name
        graph.write_bytes(content)
        yield graph


def _cut_off(path: Path) -> str:
    """Say what is missing of the weights beside an IR file; "" if nothing is."""
    weights = path.with_suffix(".bin")
    ends = [
        int(data.get("offset", 0)) + int(data.get("size", 0))
        for data in ET.parse(path).getroot().iterfind("layers/layer/data")
    ]
    size = weights.stat().st_size if weights.is_file() else 0
    if size >= max(ends, default=0):
        return ""
    return (
        f"its weights, {weights.name}, hold {size} of {max(ends)} bytes. Copy both files again, or "
        "export again."
    )
