"""The fused kernels: alone, under sanitizers and on other processors, and inside both runtimes."""

from __future__ import annotations

import ctypes
import io
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tests.kernels.test_merge import (
    INPUTS,
    OUTPUTS,
    arrays,
    assert_equal,
    attributes,
    margins,
    one_node_model,
    run_reference,
)
from tomexport.artifact import DOMAIN
from tomexport.kernels import build
from tomexport.kernels.build import Target
from tomexport.kernels.merge import reference
from tomexport.kernels.merge.cases import Case, cases
from tomexport.kernels.operators import MERGE
from tomexport.runtime.load import BACKENDS
from tomexport.runtime.machine import machine

KERNELS = build.KERNELS
HARNESS = Path(__file__).parent / "native_cases.cpp"
EPSILON = 1e-6  # of the LayerNorm in native_cases.cpp
UNDECIDED = 1e-6  # of a cosine in float32; a smaller margin decides nothing


# --- alone: one program computes all jobs


@dataclass(frozen=True, eq=False)
class Job:
    """One call of the kernel, in float32 or bfloat16. `exact`: no sum in it is rounded."""

    name: str
    r: int
    n_prefix: int
    x: Tensor
    size: Tensor
    signal: Tensor
    exact: bool = False
    raster: bool = False

    def bfloat16(self) -> Job:
        name, x, signal = f"{self.name}-bf16", self.x.bfloat16(), self.signal.bfloat16()
        return replace(self, name=name, x=x, signal=signal)

    def pack(self) -> bytes:
        """Return it as native_cases.cpp reads it."""
        (b, n, c), (g, d) = self.x.shape, self.signal.shape[1::2]
        is_bfloat16 = self.x.dtype == torch.bfloat16
        sizes = [self.r, self.n_prefix, self.raster, b, n, c, g, d, len(self.size), is_bfloat16]
        parts = (torch.tensor(sizes), self.x, self.size, self.signal, *self.affine)
        return b"".join(p.contiguous().view(torch.uint8).numpy().tobytes() for p in parts)

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and offset of the LayerNorm that follows, (C,) each."""
        index = torch.arange(self.x.shape[2]).float()
        return 1 + index % 7 / 8, index % 5 - 2

    def unpack(self, file: io.BytesIO) -> list[Tensor]:
        """Read what native_cases.cpp computed for it."""

        def read(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            content = bytearray(file.read(torch.Size(shape).numel() * dtype.itemsize))
            return torch.frombuffer(content, dtype=dtype).reshape(shape)

        b, n, c = self.x.shape
        m = n - self.r
        shapes = ((b, m, c), self.x.dtype), ((b, m, 1), torch.float32), ((b, n), torch.int64)
        shapes += ((b, m, c), self.x.dtype), ((b, m, 1), self.x.dtype)  # of what follows
        return [read(*each) for each in shapes]

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (self.x.float(), self.size, self.signal.float())
        return MERGE.reference(*inputs, r=self.r, n_prefix=self.n_prefix, raster=self.raster)

    def check(self, found: list[Tensor]) -> None:
        expected = self.expected
        np.testing.assert_array_equal(found[2], expected[2], self.name)
        np.testing.assert_array_equal(found[1], expected[1], self.name)
        rounded = expected[0].to(self.x.dtype).float()
        largest = float(rounded[rounded.isfinite()].abs().max())
        step = 2.0**-7 if self.x.dtype == torch.bfloat16 else 0  # from one bfloat16 to the next
        np.testing.assert_allclose(
            found[0].float(),
            rounded,
            rtol=0 if self.exact else step,
            atol=0 if self.exact else MERGE.tolerance * largest,
            err_msg=self.name,
        )

    def check_what_follows(self, x: Tensor, size: Tensor, norm: Tensor, log_size: Tensor) -> None:
        weight, offset = self.affine
        centred = x.double() - x.double().mean(2, keepdim=True)
        variance = centred.square().mean(2, keepdim=True)
        expected = (centred / (variance + EPSILON).sqrt() * weight + offset).to(x.dtype)
        step = 2.0**-7 if x.dtype == torch.bfloat16 else 1e-5
        np.testing.assert_allclose(norm.float(), expected.float(), step, 1e-5, err_msg=self.name)
        logarithm = size.log().to(x.dtype).float()
        np.testing.assert_allclose(log_size.float(), logarithm, step, 1e-7, err_msg=self.name)


def signs_job(index: int) -> Job:
    """A problem of any size whose signals are ±1, so that every score is exact."""
    random = np.random.default_rng(index)
    b, n, c = random.integers(1, 4), random.integers(1, 90), random.integers(1, 140)
    p = random.integers(0, min(n, 6) + 1)
    r = random.integers(0, (n - p) // 2 + 1)
    g, d = random.choice([1, 2, 4]), random.choice([1, 4, 16, 64])
    x = random.standard_normal((b, n, c)).astype(np.float32)
    size = random.integers(1, 9, (b, n, 1)).astype(np.float32)
    signal = random.choice([-1, 1], (b, 1, n, d)).astype(np.float32).repeat(g, axis=1)
    tensors = map(torch.from_numpy, (x, size, signal))
    return Job(f"signs-{index}", int(r), int(p), *tensors, raster=index % 2 == 1)


def halves_job() -> Job:
    """Two tokens become their mean, which lies between two bfloat16 values half of the time."""
    x = torch.randint(128, 256, (1, 2, 1000), generator=torch.Generator().manual_seed(0)).float()
    return Job("halves", 1, 0, x, torch.ones(1, 2, 1), torch.ones(1, 1, 2, 4), exact=True)


def odd_values_job() -> Job:
    """Tokens hold what is not finite: it stays in the slots of these tokens."""
    x, size, signal = Case(41, 18, 1, batch=2, directions="few").inputs()
    x[0, 3::5, 4], x[0, 2::9, 5], x[1, 1::4], x[1, 7] = torch.inf, -torch.inf, torch.nan, torch.inf
    return Job("odd-values", 18, 1, x, size, signal)


@lru_cache
def jobs() -> list[Job]:
    own = [
        Job(case.name, case.r, case.n_prefix, *case.inputs(), raster=case.raster)
        for case in cases()
    ]
    one_size = [
        replace(job, name=f"{job.name}-one_size", size=job.size[:1])
        for job in own
        if len(job.x) > 1
    ]
    float32 = [*own, *one_size, *map(signs_job, range(200)), halves_job(), odd_values_job()]
    return [*float32, *(job.bfloat16() for job in float32 if job.x.shape[1] < 1000)]


def test_every_job_is_decided() -> None:
    for job in jobs():
        margin = reference.margin(job.signal.float(), job.r, job.n_prefix, job.raster)
        assert ((margin == 0) | (margin > UNDECIDED)).all(), job.name


@dataclass(frozen=True)
class Variant:
    """How the program is compiled and run.

    Attributes:
        flags: the compiler's.
        compiler: its name; empty is that of this machine.
        runners: what can run the program: the first that does, will.
        needs: the processor's flag without which it cannot.
        command: how to get what is needed.
    """

    name: str
    flags: str
    compiler: str = ""
    runners: tuple[tuple[str, ...], ...] = ((),)
    needs: str = ""
    command: str = "apt install g++"


SANITIZERS = ((), ("setarch", "-R"))  # some cannot place their memory where addresses are random
VARIANTS = [
    Variant("native", "-O3 -march=native"),
    Variant(
        "address-undefined",
        "-O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all",
        runners=SANITIZERS,
    ),
    Variant("thread", "-O1 -g -march=native -fsanitize=thread", runners=SANITIZERS),
]
if platform.machine() == "x86_64":
    VARIANTS += [
        Variant("x86-64", "-O3 -march=x86-64"),
        Variant("x86-64-v3", "-O3 -march=x86-64-v3", needs="avx2"),
        Variant("x86-64-v4", "-O3 -march=x86-64-v4", needs="avx512f"),
    ]
AARCH64 = Variant(
    "aarch64",
    "-O3 -static",
    compiler="aarch64-linux-gnu-g++",
    runners=(("qemu-aarch64",), ("qemu-aarch64-static",)),
    command="apt install g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user",
)
if platform.machine() != "aarch64":
    VARIANTS.append(AARCH64)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=300)
    except OSError as err:  # there is no such program
        return subprocess.CompletedProcess(command, 127, "", str(err))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_kernel_computes_the_reference(
    variant: Variant, compiler: str, lacking: Callable, tmp_path: Path
) -> None:
    if variant.needs and variant.needs not in machine()["flags"]:
        pytest.skip(f"this processor has no {variant.needs}")

    def build_program(source: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
        program = tmp_path / source.stem
        includes = (f"-I{folder}" for folder in (KERNELS, KERNELS / "native"))
        command = [variant.compiler or compiler, *variant.flags.split(), "-std=c++17", "-pthread"]
        return run(*command, *includes, source, "-o", program), program

    trial = tmp_path / "trial.cpp"
    trial.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    _, tried = build_program(trial)
    runner = next((r for r in variant.runners if run(*r, tried).returncode == 0), None)
    if runner is None:
        lacking(f"a compiler that makes programs with {variant.flags}, which run", variant.command)

    compiled, program = build_program(HARNESS)
    assert compiled.returncode == 0, compiled.stderr
    given, results = tmp_path / "cases", tmp_path / "results"
    given.write_bytes(b"".join(job.pack() for job in jobs()))
    done = run(*runner, program, given, results)
    assert done.returncode == 0, done.stderr
    with results.open("rb") as file:
        for job in jobs():
            x, size, target, norm, log_size = job.unpack(file)
            job.check([x, size, target])
            job.check_what_follows(x, size, norm, log_size)
        assert not file.read(1)


# --- inside the runtimes

Session = Callable[[list[np.ndarray]], list[np.ndarray]]
PATTERN_X, PATTERN_SIZE, PATTERN_SIGNAL = ("B", "N", "C"), ("S", "N", 1), ("B", "G", "N", "D")


def node_alone(
    *,
    x: tuple = PATTERN_X,
    size: tuple = PATTERN_SIZE,
    signal: tuple = PATTERN_SIGNAL,
    dtype: int = TensorProto.FLOAT,
    n_inputs: int = 3,
    **attributes: int,
) -> bytes:
    """A model of one node that has no body: nothing but a kernel can compute it."""
    shapes = list(zip(INPUTS, (x, size, signal), strict=True))[:n_inputs]
    node = helper.make_node(MERGE.name, INPUTS[:n_inputs], OUTPUTS, domain=DOMAIN, **attributes)
    types = (dtype, dtype, TensorProto.INT64)
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in shapes],
        [helper.make_tensor_value_info(*pair, None) for pair in zip(OUTPUTS, types, strict=True)],
    )
    versions = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()


def onnxruntime_session(model: bytes, library: Path) -> Session:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(OUTPUTS, dict(zip(INPUTS, inputs, strict=True)))


def openvino_session(model: bytes, library: Path) -> Session:
    core = openvino.Core()
    core.add_extension(str(library))
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
    compiled = core.compile_model(core.read_model(model), "CPU", hints)

    def call(inputs: list[np.ndarray]) -> list[np.ndarray]:
        request = compiled.create_infer_request()
        results = request.infer(dict(zip(INPUTS, inputs, strict=True)))
        return [np.array(results[name]) for name in OUTPUTS]

    return call


SESSIONS = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}


@pytest.fixture(scope="module")
def libraries(kernel_cache: Path) -> dict[str, Path]:
    """The library of each runtime, built once a test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMEXPORT_CACHE", str(kernel_cache))
        return {each.name: build.library(each.name, each.version()) for each in BACKENDS}


@pytest.fixture(params=[pytest.param(b, marks=getattr(pytest.mark, b)) for b in SESSIONS])
def session(request: pytest.FixtureRequest, libraries: dict[str, Path]) -> Callable:
    """Make sessions of one runtime, which uses the kernels."""
    return lambda model: SESSIONS[request.param](model, libraries[request.param])


def fixed(case: Case, **shapes: tuple) -> bytes:
    """A model for the shapes of a case."""
    own = {name: array.shape for name, array in zip(INPUTS, arrays(case), strict=True)}
    return node_alone(**own | shapes, **attributes(case))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_both_runtimes_compute_the_reference(session: Callable, case: Case) -> None:
    inputs = arrays(case)
    assert_equal(session(fixed(case))(inputs), run_reference(case, inputs))


@pytest.mark.parametrize("r", [0, 12])
def test_one_size_serves_all_images(session: Callable, r: int) -> None:
    case = Case(41, r, 1, batch=3)
    x, size, signal = arrays(case)
    inputs = [x, size[:1], signal]
    found = session(fixed(case, size=size[:1].shape))(inputs)
    assert_equal(found, run_reference(case, inputs))


def test_sizes_may_change_from_call_to_call(session: Callable) -> None:
    call = session(node_alone(r=8, n_prefix=1))
    for n, batch, groups, dim in [(40, 1, 1, 16), (300, 3, 2, 9), (17, 1, 12, 64), (150, 2, 1, 5)]:
        case = Case(n, 8, 1, batch=batch, groups=groups, dim=dim, channels=n // 3)
        assert_equal(call(arrays(case)), run_reference(case, arrays(case)))


def test_the_kernel_wins_over_the_body(session: Callable) -> None:
    case = Case(41, 8, 1)
    model = onnx.load_from_string(one_node_model(replace(case, n_prefix=2)))
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "n_prefix":  # the body knows nothing of this
            attribute.i = 1
    found = session(model.SerializeToString())(arrays(case))
    assert_equal(found, run_reference(case, arrays(case)))


@pytest.mark.openvino
def test_openvino_computes_bfloat16(libraries: dict[str, Path]) -> None:
    job = Job("", 16, 1, *Case(197, 16, 1, batch=3, groups=3, dim=64).inputs()).bfloat16()
    model = onnx.load_from_string(node_alone(r=job.r, n_prefix=job.n_prefix))
    for port in (model.graph.input[0], model.graph.input[2], model.graph.output[0]):
        port.type.tensor_type.elem_type = TensorProto.BFLOAT16
    core = openvino.Core()
    core.add_extension(str(libraries["openvino"]))
    read = core.read_model(model.SerializeToString())
    (node,) = (op for op in read.get_ops() if op.get_type_name() == MERGE.name)

    def wrap(tensor: Tensor) -> openvino.Tensor:  # which shares its memory
        if tensor.dtype != torch.bfloat16:
            return openvino.Tensor(tensor.numpy(), shared_memory=True)
        bits = tensor.view(torch.int16).numpy()
        return openvino.Tensor(bits, openvino.Shape(bits.shape), openvino.Type.bf16)

    found = [
        torch.empty_like(e).to(job.x.dtype if i == 0 else e.dtype)
        for i, e in enumerate(job.expected)
    ]
    assert node.evaluate([*map(wrap, found)], [*map(wrap, (job.x, job.size, job.signal))])
    job.check(found)


@pytest.mark.parametrize("batch", [1, 3])
def test_four_threads_may_call_one_session(session: Callable, batch: int) -> None:
    case = Case(197, 16, 1, batch=batch, groups=3, dim=64, channels=192)
    x, size, signal = arrays(case)
    inputs = [
        [np.roll(array, shift, axis) for array, axis in ((x, 1), (size, 1), (signal, 2))]
        for shift in range(4)
    ]
    expected = [run_reference(case, each) for each in inputs]
    assert all((margins(signal, case) > UNDECIDED).all() for _, _, signal in inputs)
    call = session(fixed(case))

    def repeat(thread: int) -> None:
        for _ in range(50):
            assert_equal(call(inputs[thread]), expected[thread])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(repeat, range(4)))


# --- refused, by both runtimes, with a message


def refuse(session: Callable, model: bytes, inputs: list[np.ndarray], message: str) -> None:
    with pytest.raises(Exception, match=rf"(?s){message}"):
        session(model)(inputs)


@pytest.mark.parametrize(
    "shapes",
    [
        {"signal": (2, 41, 16)},
        {"x": (41, 24)},
        {"size": (41,)},
        {"size": (2, 41, 2)},
        {"size": (2, 40, 1)},
        {"size": (3, 41, 1)},
        {"signal": (2, 1, 40, 16)},
        {"signal": (1, 1, 41, 16)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_shapes_that_do_not_fit(session: Callable, shapes: dict, dynamic: bool) -> None:
    fitting = {"x": (2, 41, 24), "size": (2, 41, 1), "signal": (2, 1, 41, 16)}
    given = fitting | shapes
    declared = {name: (None,) * len(shape) for name, shape in given.items()} if dynamic else given
    inputs = [np.ones(shape, np.float32) for shape in given.values()]
    wanted = r"x \(B,N,C\), size \(B,N,1\),? (and )?signal \(B,G,N,D\) wanted"
    refuse(session, node_alone(**declared, r=8, n_prefix=1), inputs, wanted)


@pytest.mark.parametrize(("r", "n_prefix"), [(21, 1), (20, 2), (-1, 1), (1, -1), (0, 42)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_counts_that_cannot_be(session: Callable, r: int, n_prefix: int, dynamic: bool) -> None:
    case = Case(41, r, n_prefix)
    model = node_alone(r=r, n_prefix=n_prefix) if dynamic else fixed(case)
    refuse(session, model, arrays(case), "r must be 0 to half of the tokens after the prefix")


@pytest.mark.parametrize("left_out", ["r", "n_prefix"])
def test_attributes_that_are_missing(session: Callable, left_out: str) -> None:
    attributes = {"r": 8, "n_prefix": 1}
    del attributes[left_out]
    refuse(session, node_alone(**attributes), arrays(Case(41, 8, 1)), left_out)


def test_an_input_that_is_missing(session: Callable) -> None:
    inputs = arrays(Case(41, 8, 1))[:2]
    refuse(session, node_alone(n_inputs=2, r=8, n_prefix=1), inputs, "input size 2|index '2'")


def test_a_type_that_it_cannot_compute(session: Callable) -> None:
    inputs = [array.astype(np.float64) for array in arrays(Case(41, 8, 1))]
    model = node_alone(dtype=TensorProto.DOUBLE, r=8, n_prefix=1)
    refuse(session, model, inputs, "double|f64")


# --- for another machine


@pytest.mark.onnxruntime
def test_a_library_for_a_board(compiler: str, lacking: Callable, tmp_path: Path) -> None:
    if not shutil.which(AARCH64.compiler):
        lacking(AARCH64.compiler, AARCH64.command)
    toolchain = tmp_path / "aarch64.cmake"
    toolchain.write_text(
        "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\n"
        f"set(CMAKE_CXX_COMPILER {AARCH64.compiler})\n"
    )
    made = build.build(Target("onnxruntime", None, "armv8.2-a", toolchain), tmp_path)
    assert made.path.name == "libtomexport_onnxruntime-1.17+-armv8.2-a.so"
    header = made.path.read_bytes()[:20]
    assert header[:5] == b"\x7fELF\x02"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64


# --- ONNX Runtime's C interface, by the numbers of onnxruntime_abi.h


class _Base(ctypes.Structure):
    _fields_ = [
        ("get_api", ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint32)),
        ("get_version", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    ]


@pytest.fixture(scope="module")
def api() -> Callable:
    """Call a slot of OrtApi: (what it returns, its name in the header or its number, arguments)."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    names = [*folder.glob("libonnxruntime.*"), *folder.glob("onnxruntime_pybind11_state*")]
    get_base = ctypes.CDLL(str(names[0])).OrtGetApiBase
    get_base.restype = ctypes.POINTER(_Base)
    base = get_base().contents
    assert base.get_version().decode() == onnxruntime.__version__

    header = (KERNELS / "native/onnxruntime_abi.h").read_text()
    (version,) = re.findall(r"kApiVersion = (\d+);", header)
    slots = base.get_api(int(version))
    named = {
        name + ("_" + kind if name == "release" else ""): int(slot)
        for name, kind, slot in re.findall(
            r"(\w+)\((?:const )?(\w+)[^{}]*\{\s*(?:return )?call<(\d+)", header
        )
    }

    def call(result: type | None, slot: str | int, *arguments: object) -> object:
        number = named[slot] if isinstance(slot, str) else slot
        return ctypes.CFUNCTYPE(result, *map(type, arguments))(slots[number])(*arguments)

    return call


P, S = ctypes.c_void_p, ctypes.c_size_t


@pytest.mark.onnxruntime
def test_slots_of_status(api: Callable) -> None:
    text = ctypes.c_char_p(b"of a length")
    status = P(api(P, "create_status", ctypes.c_int(2), text))
    assert api(ctypes.c_int, 1, status) == 2  # GetErrorCode
    assert api(ctypes.c_char_p, 2, status) == text.value  # GetErrorMessage
    api(None, "release_Status", status)


@pytest.mark.onnxruntime
def test_slots_of_tensors(api: Callable) -> None:
    allocator, tensor, info, data, n_dims = P(), P(), P(), P(), S()
    dims, read = (ctypes.c_int64 * 3)(2, 5, 7), (ctypes.c_int64 * 3)()
    ref, start = ctypes.byref, ctypes.cast

    def done(slot: str | int, *arguments: object) -> None:
        assert api(P, slot, *arguments) is None  # no status

    def out(value: object) -> P:
        return start(ref(value), P)

    done(78, out(allocator))  # GetAllocatorWithDefaultOptions
    done(
        48, allocator, start(dims, P), S(3), ctypes.c_int(1), out(tensor)
    )  # CreateTensorAsOrtValue
    done("data", tensor, out(data))
    done("shape", tensor, out(info))
    done("n_dims", info, out(n_dims))
    done("dims", info, start(read, P), n_dims)
    assert n_dims.value == 3
    assert list(read) == [2, 5, 7]
    ctypes.memset(data, 0, 2 * 5 * 7 * 4)
    api(None, "release_ShapeInfo", info)
    api(None, 96, tensor)  # ReleaseValue
