"""The fused kernels: alone, under sanitizers and on other processors, and inside both runtimes."""

from __future__ import annotations

import ctypes
import io
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tests.kernels.test_merge import margins, one_node_model
from tomexport.artifact import DOMAIN
from tomexport.kernels import build
from tomexport.kernels.build import Target
from tomexport.kernels.merge import reference
from tomexport.kernels.merge.cases import Case
from tomexport.kernels.operators import MERGE, OPERATORS, RANK, REDUCE, Operator
from tomexport.kernels.rank.cases import Case as RankCase
from tomexport.kernels.reduce.cases import Case as ReduceCase
from tomexport.runtime.load import BACKENDS
from tomexport.runtime.machine import machine

KERNELS = build.KERNELS
HARNESS = Path(__file__).parent / "native_cases.cpp"
EPSILON = 1e-6  # of the LayerNorm in native_cases.cpp
UNDECIDED = 1e-6  # of a cosine in float32; a smaller margin decides nothing
REAL = ("x", "signal")  # inputs that can be bfloat16
WHOLE = ("target", "rank", "order")  # what is a whole number for each token
DIMS = {  # of each input, where any number will do
    "x": ("B", "N", "C"),
    "size": ("S", "N", 1),
    "signal": ("B", "G", "N", "D"),
    "mass": ("B", "N", 1),
    "target": ("B", "N"),
    "weight": ("B", "N", 1),
    "score": ("B", "N"),
}


# --- alone: one program computes all jobs


@dataclass(frozen=True, eq=False)
class Job:
    """One call of a kernel.

    Attributes:
        exact: no sum in it is rounded.
        narrow: reals are bfloat16 and integers have 32 bits, as in OpenVINO.
    """

    name: str
    operator: Operator
    attributes: dict[str, int]
    inputs: tuple[Tensor, ...]
    exact: bool = False
    narrow: bool = False

    @property
    def x(self) -> Tensor:
        return self.given("x")

    @property
    def n_tokens(self) -> int:
        return self.inputs[0].shape[1]

    @property
    def reduces(self) -> bool:
        return "x" in self.operator.inputs

    def given(self, name: str) -> Tensor:
        return self.inputs[self.operator.inputs.index(name)]

    def narrowed(self) -> Job:
        inputs = [
            tensor.bfloat16() if name in REAL else tensor.int() if is_integer(tensor) else tensor
            for name, tensor in zip(self.operator.inputs, self.inputs, strict=True)
        ]
        return replace(self, name=f"{self.name}-narrow", inputs=tuple(inputs), narrow=True)

    def pack(self) -> bytes:
        """Return it as native_cases.cpp reads it."""
        arrays = (*self.inputs, *self.affine)
        attributes = [self.attributes.get(name, 0) for name in self.operator.attributes]
        numbers = [self.narrow, self.narrow, *attributes, *(n for a in arrays for n in a.shape)]
        parts = (torch.tensor(numbers, dtype=torch.int64), *arrays)
        content = b"".join(p.contiguous().view(torch.uint8).numpy().tobytes() for p in parts)
        return self.operator.name.encode().ljust(16, b"\0") + content

    @property
    def affine(self) -> tuple[Tensor, ...]:
        """Weight and offset of the LayerNorm that follows, (C,) each; none where there is none."""
        if not self.reduces:
            return ()
        index = torch.arange(self.x.shape[2]).float()
        return 1 + index % 7 / 8, index % 5 - 2

    def unpack(self, file: io.BytesIO) -> list[Tensor]:
        """Read what native_cases.cpp computed for it, what follows included."""

        def read(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            content = bytearray(file.read(torch.Size(shape).numel() * dtype.itemsize))
            return torch.frombuffer(content, dtype=dtype).reshape(shape)

        b, n, *c = self.inputs[0].shape
        kinds = dict.fromkeys(WHOLE, ((b, n), torch.int32 if self.narrow else torch.int64))
        names = self.operator.outputs
        if self.reduces:
            m, real = n - self.attributes["r"], self.x.dtype
            kinds |= {"x": ((b, m, *c), real), "size": ((b, m, 1), torch.float32)}
            kinds |= {"norm": ((b, m, *c), real), "log_size": ((b, m, 1), real)}
            names = (*names, "norm", "log_size")
        return [read(*kinds[name]) for name in names]

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        n_slots = self.n_tokens - self.attributes.get("r", 0)
        inputs = (
            t.long().where(t < n_slots, -1) if is_integer(t) else t.float() for t in self.inputs
        )
        return self.operator.reference(*inputs, **self.attributes)

    def check(self, found: Sequence[Tensor]) -> None:
        """Tokens are close; all else, whole numbers, is identical."""
        for name, one, other in zip(self.operator.outputs, found, self.expected, strict=True):
            if name == "x":
                self.check_tokens(one, other)
            else:
                np.testing.assert_array_equal(one, other, self.name)

    def check_tokens(self, found: Tensor, expected: Tensor) -> None:
        rounded = expected.to(self.x.dtype).float()
        largest = float(rounded[rounded.isfinite()].abs().max())
        step = 2.0**-7 if self.x.dtype == torch.bfloat16 else 0  # from one bfloat16 to the next
        np.testing.assert_allclose(
            found.float(),
            rounded,
            rtol=0 if self.exact else step,
            atol=0 if self.exact else self.operator.tolerance * largest,
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


def is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()


def job_of(operator: Operator, case: Any) -> Job:
    return Job(f"{operator.name}-{case.name}", operator, case.attributes, case.inputs())


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
    attributes = {"r": int(r), "n_prefix": int(p), "raster": index % 2}
    return Job(f"signs-{index}", MERGE, attributes, tuple(map(torch.from_numpy, (x, size, signal))))


def halves_job() -> Job:
    """Two tokens become their mean, which lies between two bfloat16 values half of the time."""
    x = torch.randint(128, 256, (1, 2, 1000), generator=torch.Generator().manual_seed(0)).float()
    inputs = (x, torch.ones(1, 2, 1), torch.ones(1, 1, 2, 4))
    return Job("halves", MERGE, {"r": 1, "n_prefix": 0}, inputs, exact=True)


def odd_values_job() -> Job:
    """Tokens hold what is not finite: it stays in the slots of these tokens."""
    job = job_of(MERGE, Case(41, 18, 1, batch=2, directions="few"))
    x = job.x
    x[0, 3::5, 4], x[0, 2::9, 5], x[1, 1::4], x[1, 7] = torch.inf, -torch.inf, torch.nan, torch.inf
    return replace(job, name="odd-values")


def weights_job(mean: int) -> Job:
    """Tokens weigh nothing, one or two, each in a slot of its own; a slot without weight is NaN."""
    x, mass, _, _ = ReduceCase(40, 0, batch=2).inputs()
    target = torch.arange(40).flip(0).expand(2, -1).contiguous()
    weight = (torch.arange(80) % 3).float().reshape(2, 40, 1)
    inputs = (x, mass, target, weight)
    return Job(f"weights-{mean}", REDUCE, {"r": 0, "mean": mean}, inputs, exact=True)


def outside_job() -> Job:
    """Tokens that say a slot which there is not go nowhere, as in the standard form."""
    job = job_of(REDUCE, ReduceCase(41, 12, dropped=6, mean=0))
    target = job.given("target")
    dropped = torch.where(target[0] < 0)[0]
    target[0, dropped[:3]] = torch.tensor([29, 2**31 - 1, -(2**31)])
    return replace(job, name="outside")


@lru_cache
def jobs() -> list[Job]:
    own = [job_of(operator, case) for operator in OPERATORS for case in operator.cases()]
    one_size = [
        replace(
            job,
            name=f"{job.name}-one_size",
            inputs=(job.x, job.given("size")[:1], job.given("signal")),
        )
        for job in own
        if "size" in job.operator.inputs and len(job.x) > 1
    ]
    float32 = [
        *(*own, *one_size, *map(signs_job, range(200)), halves_job(), odd_values_job()),
        *(*map(weights_job, (0, 1)), outside_job()),
    ]
    return [*float32, *(job.narrowed() for job in float32 if job.n_tokens < 1000)]


def test_every_job_is_decided() -> None:
    for job in jobs():
        if job.operator is not MERGE:
            continue
        margin = reference.margin(job.given("signal").float(), **job.attributes)
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
            found, n = job.unpack(file), len(job.operator.outputs)
            job.check(found[:n])
            if job.reduces:
                job.check_what_follows(*found[:2], *found[n:])
        assert not file.read(1)


# --- inside the runtimes

Session = Callable[[list[np.ndarray]], list[np.ndarray]]


def outputs_of(operator: Operator) -> list[str]:
    return [f"{name}_out" for name in operator.outputs]


def node_alone(
    operator: Operator,
    attributes: dict[str, int],
    *,
    dims: dict[str, tuple] = DIMS,
    dtype: int = TensorProto.FLOAT,
    left_out: int = 0,
) -> bytes:
    """A model of one node that has no body: nothing but a kernel can compute it."""

    def value(name: str, shape: tuple | None) -> onnx.ValueInfoProto:
        whole = name.removesuffix("_out") in WHOLE
        return helper.make_tensor_value_info(name, TensorProto.INT64 if whole else dtype, shape)

    inputs = operator.inputs[: len(operator.inputs) - left_out]
    outputs = outputs_of(operator)
    node = helper.make_node(operator.name, inputs, outputs, domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one_node",
        [value(name, dims[name]) for name in inputs],
        [value(name, None) for name in outputs],
    )
    versions = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()


def onnxruntime_session(model: bytes, library: Path) -> Session:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def openvino_session(model: bytes, library: Path) -> Session:
    core = openvino.Core()
    core.add_extension(str(library))
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
    compiled = core.compile_model(core.read_model(model), "CPU", hints)

    def call(inputs: list[np.ndarray]) -> list[np.ndarray]:
        results = compiled.create_infer_request().infer(inputs)
        return [np.array(results[port]) for port in compiled.outputs]

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


def arrays(case: Any) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in case.inputs()]


def fixed(operator: Operator, case: Any, **dims: tuple) -> bytes:
    """A model for the shapes of a case."""
    own = {n: a.shape for n, a in zip(operator.inputs, arrays(case), strict=True)}
    return node_alone(operator, case.attributes, dims=own | dims)


def check(operator: Operator, case: Any, inputs: list[np.ndarray], found: list[np.ndarray]) -> None:
    job = Job(case.name, operator, case.attributes, tuple(map(torch.from_numpy, inputs)))
    job.check([torch.from_numpy(array) for array in found])
    assert [a.dtype for a in found] == [t.numpy().dtype for t in job.expected]


EXAMPLES = {
    "Merge": Case(197, 16, 1, groups=3, dim=64, channels=192),
    "Reduce": ReduceCase(197, 57, channels=192, dropped=20),
    "Rank": RankCase(196),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda each: each.name)
each_reduction = pytest.mark.parametrize("operator", [MERGE, REDUCE], ids=lambda each: each.name)


def changed(case: Any, **sizes: int) -> Any:
    """A case with other sizes, as far as it has them."""
    return replace(case, **{name: n for name, n in sizes.items() if name in asdict(case)})


def test_every_operator_has_an_example() -> None:
    assert [*EXAMPLES] == [operator.name for operator in OPERATORS]


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        pytest.param(operator, case, id=f"{operator.name}-{case.name}")
        for operator in OPERATORS
        for case in operator.cases()
    ],
)
def test_both_runtimes_compute_the_reference(
    session: Callable, operator: Operator, case: Any
) -> None:
    inputs = arrays(case)
    check(operator, case, inputs, session(fixed(operator, case))(inputs))


@pytest.mark.parametrize("r", [0, 12])
def test_one_size_serves_all_images(session: Callable, r: int) -> None:
    case = Case(41, r, 1, batch=3)
    x, size, signal = arrays(case)
    inputs = [x, size[:1], signal]
    check(MERGE, case, inputs, session(fixed(MERGE, case, size=size[:1].shape))(inputs))


@each_operator
def test_sizes_may_change_from_call_to_call(session: Callable, operator: Operator) -> None:
    example = changed(EXAMPLES[operator.name], r=8, dropped=3)
    call = session(node_alone(operator, example.attributes))
    for n, batch, groups, dim in [(40, 1, 1, 16), (300, 3, 2, 9), (17, 1, 12, 64), (150, 2, 1, 5)]:
        case = changed(example, n=n, batch=batch, channels=n // 3, groups=groups, dim=dim)
        check(operator, case, arrays(case), call(arrays(case)))


def test_the_kernel_wins_over_the_body(session: Callable) -> None:
    case = Case(41, 8, 1)
    model = onnx.load_from_string(one_node_model(replace(case, n_prefix=2)))
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "n_prefix":  # the body knows nothing of this
            attribute.i = 1
    found = session(model.SerializeToString())(arrays(case))
    check(MERGE, case, arrays(case), found)


@pytest.mark.openvino
@each_reduction
def test_openvino_computes_bfloat16(libraries: dict[str, Path], operator: Operator) -> None:
    job = job_of(operator, replace(EXAMPLES[operator.name], batch=3)).narrowed()
    model = onnx.load_from_string(node_alone(operator, job.attributes))
    for port in (*model.graph.input, model.graph.output[0]):
        if port.name in (*REAL, "x_out"):
            port.type.tensor_type.elem_type = TensorProto.BFLOAT16
    core = openvino.Core()
    core.add_extension(str(libraries["openvino"]))
    read = core.read_model(model.SerializeToString())
    (node,) = (op for op in read.get_ops() if op.get_type_name() == operator.name)

    def wrap(tensor: Tensor) -> openvino.Tensor:  # which shares its memory
        if tensor.dtype != torch.bfloat16:
            return openvino.Tensor(tensor.numpy(), shared_memory=True)
        bits = tensor.view(torch.int16).numpy()
        return openvino.Tensor(bits, openvino.Shape(bits.shape), openvino.Type.bf16)

    found = [
        torch.empty_like(e).to(job.x.dtype if i == 0 else e.dtype)
        for i, e in enumerate(job.expected)
    ]
    assert node.evaluate([*map(wrap, found)], [*map(wrap, job.inputs)])
    job.check(found)


@pytest.mark.parametrize("batch", [1, 3])
@each_operator
def test_four_threads_may_call_one_session(
    session: Callable, operator: Operator, batch: int
) -> None:
    case = replace(EXAMPLES[operator.name], batch=batch)
    inputs = [
        [np.roll(array, shift, array.shape.index(case.n)) for array in arrays(case)]
        for shift in range(4)
    ]
    if operator is MERGE:
        assert all((margins(signal, case) > UNDECIDED).all() for _, _, signal in inputs)
    call = session(fixed(operator, case))

    def repeat(thread: int) -> None:
        for _ in range(50):
            check(operator, case, inputs[thread], call(inputs[thread]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(repeat, range(4)))


# --- refused, by both runtimes, with a message


def refuse(session: Callable, model: bytes, inputs: list[np.ndarray], message: str) -> None:
    with pytest.raises(Exception, match=rf"(?s){message}"):
        session(model)(inputs)


FITTING = {
    "x": (2, 41, 24),
    "size": (2, 41, 1),
    "signal": (2, 1, 41, 16),
    "mass": (2, 41, 1),
    "target": (2, 41),
    "weight": (2, 41, 1),
    "score": (2, 41),
}


@pytest.mark.parametrize(
    ("operator", "name", "shape"),
    [
        (MERGE, "signal", (2, 41, 16)),
        (MERGE, "x", (41, 24)),
        (MERGE, "size", (41,)),
        (MERGE, "size", (2, 41, 2)),
        (MERGE, "size", (2, 40, 1)),
        (MERGE, "size", (3, 41, 1)),
        (MERGE, "signal", (2, 1, 40, 16)),
        (MERGE, "signal", (1, 1, 41, 16)),
        (REDUCE, "x", (2, 41)),
        (REDUCE, "x", (2, 1, 1, 41, 24)),
        (REDUCE, "mass", (1, 41, 1)),
        (REDUCE, "mass", (2, 41, 24)),
        (REDUCE, "target", (2, 40)),
        (REDUCE, "target", (2, 41, 1)),
        (REDUCE, "weight", (2, 41)),
        (RANK, "score", (41,)),
        (RANK, "score", (2, 41, 1)),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_shapes_that_do_not_fit(
    session: Callable, operator: Operator, name: str, shape: tuple, dynamic: bool
) -> None:
    given = {each: FITTING[each] for each in operator.inputs} | {name: shape}
    dims = {n: (None,) * len(s) for n, s in given.items()} if dynamic else given
    inputs = [np.ones(s, np.int64 if n == "target" else np.float32) for n, s in given.items()]
    wanted = ", ".join(
        f"{n} ({','.join(map(str, DIMS[n]))})".replace("S", "B") for n in operator.inputs
    )
    attributes = changed(EXAMPLES[operator.name], r=8).attributes
    model = node_alone(operator, attributes, dims=dims)
    refuse(session, model, inputs, re.escape(f"{wanted} wanted"))


@pytest.mark.parametrize(
    ("operator", "attributes", "message"),
    [
        *(
            (MERGE, {"r": r, "n_prefix": p}, "r must be 0 to half of the tokens after the prefix")
            for r, p in [(21, 1), (20, 2), (-1, 1), (1, -1), (0, 42)]
        ),
        *(
            (REDUCE, {"r": r, "mean": 1}, "r must be 0 to one less than the tokens")
            for r in (-1, 41, 42)
        ),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_counts_that_cannot_be(
    session: Callable, operator: Operator, attributes: dict, message: str, dynamic: bool
) -> None:
    case = replace(EXAMPLES[operator.name], n=41, r=21)
    inputs = arrays(case)
    own = {n: a.shape for n, a in zip(operator.inputs, inputs, strict=True)}
    model = node_alone(operator, attributes, dims=DIMS if dynamic else own)
    refuse(session, model, inputs, message)


@pytest.mark.parametrize(
    ("operator", "left_out"),
    [(MERGE, "r"), (MERGE, "n_prefix"), (REDUCE, "r"), (REDUCE, "mean")],
)
def test_attributes_that_are_missing(session: Callable, operator: Operator, left_out: str) -> None:
    case = EXAMPLES[operator.name]
    attributes = {name: value for name, value in case.attributes.items() if name != left_out}
    refuse(session, node_alone(operator, attributes), arrays(case), rf"\b{left_out}\b")


@each_operator
def test_an_input_that_is_missing(session: Callable, operator: Operator) -> None:
    case, n = EXAMPLES[operator.name], len(operator.inputs) - 1
    model = node_alone(operator, case.attributes, left_out=1)
    refuse(session, model, arrays(case)[:n], f"input size {n}|index '{n}'")


@each_operator
def test_a_type_that_it_cannot_compute(session: Callable, operator: Operator) -> None:
    case = EXAMPLES[operator.name]
    inputs = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays(case)]
    model = node_alone(operator, case.attributes, dtype=TensorProto.DOUBLE)
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
