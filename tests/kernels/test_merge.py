"""Merge in its forms: torch, a slow loop of the paper's rule, and the body on both runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import inliner

from tomexport.artifact import DOMAIN
from tomexport.kernels.merge import reference
from tomexport.kernels.merge.cases import Case, cases
from tomexport.kernels.operators import MERGE

OPSET = 18
INPUTS = ("x", "size", "signal")
OUTPUTS = ("merged", "merged_size", "target")

each_case = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


# --- the rule, as a slow loop


def slow_scores(signal: np.ndarray, n_prefix: int) -> tuple[np.ndarray, list[int], list[int]]:
    """Cosine of even with odd positions, (|A|, |B|), and these positions; −inf for NaN."""
    set_a = [t for t in range(n_prefix, signal.shape[1]) if t % 2 == 0]
    set_b = [t for t in range(n_prefix, signal.shape[1]) if t % 2 == 1]
    with np.errstate(invalid="ignore"):
        metric = signal.astype(np.float64).mean(0)
        unit = metric / np.sqrt((metric**2).sum(1, keepdims=True))
        scores = unit[set_a] @ unit[set_b].T
    return np.where(np.isnan(scores), -np.inf, scores), set_a, set_b


def slow_match(signal: np.ndarray, r: int, n_prefix: int, raster: bool = False) -> np.ndarray:
    """The slot of each token of one image, from its signal (G, N, D)."""
    n = signal.shape[1]
    if r == 0:
        return np.arange(n)
    scores, set_a, set_b = slow_scores(signal, n_prefix)
    partner = {i: set_b[row.argmax()] for i, row in zip(set_a, scores, strict=True)}  # the first
    best = dict(zip(set_a, scores.max(1), strict=True))
    ranked = sorted(set_a, key=lambda i: -best[i])  # stable: the lower index first
    sources, kept = ranked[:r], ranked[r:]
    order = [*range(n_prefix), *(sorted(kept) if n_prefix else kept), *set_b]
    goes_to = [partner[t] if t in sources else t for t in range(n)]
    if raster:
        order.sort(key=goes_to.index)  # by the first token that goes there
    slot = {token: place for place, token in enumerate(order)}
    return np.array([slot[token] for token in goes_to])


def slow_merge(
    x: np.ndarray, size: np.ndarray, target: np.ndarray, n_slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """The size-weighted mean of each slot of one image, and its size."""
    total, sizes = np.zeros((n_slots, x.shape[1])), np.zeros((n_slots, 1))
    for token, slot in enumerate(target):
        total[slot] += x[token].astype(np.float64) * size[token]
        sizes[slot] += size[token]
    return total / sizes, sizes


def slow_margin(signal: np.ndarray, r: int, n_prefix: int, raster: bool = False) -> float:
    """The smallest difference of two scores whose exchange would change the target."""
    if r == 0:
        return np.inf
    scores, _, _ = slow_scores(signal, n_prefix)
    best = scores.max(1)
    ranked = np.argsort(-best, kind="stable")
    gaps = [np.inf]
    with np.errstate(invalid="ignore"):  # −inf less −inf
        for place, i in enumerate(ranked):
            if place < r:  # it merges: another partner, or a kept token in its stead
                gaps += [*(best[i] - np.delete(scores[i], scores[i].argmax()))]
                gaps += [*(best[i] - best[ranked[r:]])]
            elif not n_prefix and not raster:  # it stays, at a place that its rank gives
                gaps += [*(best[i] - best[ranked[place + 1 :]])]
    return float(np.nan_to_num(min(gaps) if not np.isnan(gaps).any() else 0.0, posinf=np.inf))


# --- the forms


def one_node_model(case: Case, *, opset: int = OPSET, size_batch: int | None = None) -> bytes:
    """A model of one Merge node with its body, as an export holds it."""

    def value(name: str, *shape: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    b, n, m = case.batch, case.n, case.n - case.r
    body = MERGE.body(n, opset, case.attributes)
    inputs = [
        value("x", b, n, case.channels),
        value("size", size_batch or b, n, 1),
        value("signal", b, case.groups, n, case.dim),
    ]
    outputs = [
        value("merged", b, m, case.channels),
        value("merged_size", b, m, 1),
        value("target", b, n, dtype=ir.DataType.INT64),
    ]
    node = ir.Node(
        DOMAIN,
        MERGE.name,
        inputs,
        [ir.AttrInt64(name, value) for name, value in case.attributes.items()],
        overload=body.overload,
        outputs=outputs,
    )
    versions = {"": opset, DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports=versions, name="one_node")
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[body])).SerializeToString()


def inlined(model: bytes) -> bytes:
    return inliner.inline_local_functions(onnx.load_from_string(model)).SerializeToString()


def run_onnxruntime(model: bytes, inputs: list[np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(OUTPUTS, dict(zip(INPUTS, inputs, strict=True)))


def run_openvino(
    model: bytes, inputs: list[np.ndarray], precision: str = "f32"
) -> list[np.ndarray]:
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(model), "CPU", hints)
    used = {port.any_name for port in compiled.inputs}  # where r = 0 nothing reads the signal
    named = zip(INPUTS, inputs, strict=True)
    results = compiled({name: array for name, array in named if name in used})
    return [np.array(results[port]) for port in compiled.outputs]


FORMS = {
    "onnxruntime-function": run_onnxruntime,
    "onnxruntime-inlined": lambda model, inputs: run_onnxruntime(inlined(model), inputs),
    "openvino-inlined": lambda model, inputs: run_openvino(inlined(model), inputs),
}
each_form = pytest.mark.parametrize(
    "form",
    [
        pytest.param(run, id=name, marks=getattr(pytest.mark, name.split("-")[0]))
        for name, run in FORMS.items()
    ],
)
Form = Callable[[bytes, list[np.ndarray]], list[np.ndarray]]


def run_reference(case: Case, inputs: list[np.ndarray]) -> list[np.ndarray]:
    tensors = [torch.from_numpy(array) for array in inputs]
    found = MERGE.reference(*tensors, r=case.r, n_prefix=case.n_prefix, raster=case.raster)
    return [tensor.numpy() for tensor in found]


def arrays(case: Case) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in case.inputs()]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Targets and sizes, whole numbers, are identical; values within the operator's tolerance."""
    merged, size, target = expected
    np.testing.assert_array_equal(found[2], target)
    np.testing.assert_array_equal(found[1], size)
    np.testing.assert_allclose(found[0], merged, rtol=0, atol=MERGE.tolerance * abs(merged).max())
    assert [a.dtype for a in found] == [a.dtype for a in expected]


@each_form
@each_case
def test_every_form_computes_the_reference(case: Case, form: Form) -> None:
    inputs = arrays(case)
    both = form(one_node_model(case), inputs), run_reference(case, inputs)
    sound = np.arange(case.batch) != case.broken  # in the others, what merges is not defined
    assert_equal(*([array[sound] for array in arrays] for arrays in both))


@each_form
@pytest.mark.parametrize("n_prefix", [0, 1])
@pytest.mark.parametrize("r", [0, 12])
def test_one_size_serves_all_images(r: int, n_prefix: int, form: Form) -> None:
    case = Case(41, r, n_prefix, batch=3)
    x, size, signal = arrays(case)
    whole = [x, np.repeat(size[:1], 3, axis=0), signal]
    expected = run_reference(case, whole)
    assert_equal(run_reference(case, [x, size[:1], signal]), expected)
    model = one_node_model(case, size_batch=1)
    assert_equal(form(model, [x, size[:1], signal]), expected)


@pytest.mark.onnxruntime
@pytest.mark.parametrize("opset", range(18, 24))
@pytest.mark.parametrize("n_prefix", [0, 2])
def test_body_computes_the_same_at_every_opset(opset: int, n_prefix: int) -> None:
    case = Case(40, 9, n_prefix, batch=2, directions="few")
    inputs = arrays(case)
    found = run_onnxruntime(one_node_model(case, opset=opset), inputs)
    assert_equal(found, run_reference(case, inputs))


def in_bfloat16(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The slot of each token, and the share of each token in each slot, (M, N)."""
    n = case.n
    case = replace(case, channels=n)
    model = onnx.load_from_string(inlined(one_node_model(case)))
    del model.graph.output[1:]  # OpenVINO computes in float32 what leads to an output of integers
    x, size, signal = np.eye(n, dtype=np.float32)[None], np.ones((1, n, 1)), arrays(case)[2]
    inputs = [x, size.astype(np.float32), signal]
    (merged,) = run_openvino(model.SerializeToString(), inputs, "bf16")
    slots, tokens = merged[0].nonzero()
    np.testing.assert_array_equal(np.sort(tokens), range(n))  # each has one slot
    return slots[tokens.argsort()], merged


@pytest.mark.openvino
@pytest.mark.parametrize("n_prefix", [0, 2])
@pytest.mark.parametrize("n", [197, 784, 1601])
def test_slots_stand_in_raster_order_in_bfloat16(n: int, n_prefix: int) -> None:
    target, merged = in_bfloat16(Case(n, 40, n_prefix, groups=2, raster=True))
    firsts = [target.tolist().index(slot) for slot in range(n - 40)]
    assert firsts == sorted(firsts)
    np.testing.assert_allclose(merged[0].sum(axis=1), 1, rtol=2**-7)


@pytest.mark.openvino
@pytest.mark.parametrize("n_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [197, 784, 1601])  # bfloat16 has no odd numbers above 256
@pytest.mark.parametrize("directions", ["many", "few"])
def test_every_token_has_its_slot_in_bfloat16(n: int, n_prefix: int, directions: str) -> None:
    m = n - 40
    target, merged = in_bfloat16(Case(n, 40, n_prefix, groups=2, directions=directions))
    hits = np.bincount(target, minlength=m)
    assert hits.min() >= 1
    set_b = [j for j in range(n_prefix, n) if j % 2]
    assert (hits[: m - len(set_b)] == 1).all()  # only tokens of B are merged into
    np.testing.assert_array_equal(target[:n_prefix], range(n_prefix))
    np.testing.assert_array_equal(target[set_b], range(m - len(set_b), m))
    np.testing.assert_allclose(merged[0].sum(axis=1), 1, rtol=2**-7)


def test_operator_called_in_torch_is_the_reference() -> None:
    case = Case(41, 10, 2, batch=3)
    x, size, signal = case.inputs()
    called = MERGE(x, size, signal, r=10, n_prefix=2)
    assert_equal([t.numpy() for t in called], run_reference(case, arrays(case)))
    called = MERGE(x, size, signal, r=10, n_prefix=2, raster=True)
    case = replace(case, raster=True)
    assert_equal([t.numpy() for t in called], run_reference(case, arrays(case)))


# --- the graph


@lru_cache
def inferred(case: Case) -> onnx.GraphProto:
    model = onnx.load_from_string(inlined(one_node_model(case)))
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph


@each_case
def test_model_passes_the_checker(case: Case) -> None:
    onnx.checker.check_model(onnx.load_from_string(one_node_model(case)), full_check=True)


@each_case
def test_body_has_no_shape_arithmetic_and_no_unstable_operator(case: Case) -> None:
    operators = {node.op_type for node in inferred(case).node}
    assert {node.domain for node in inferred(case).node} <= {"", "ai.onnx"}
    assert not operators & {
        *("Shape", "Size", "Range", "Where", "Expand", "ConstantOfShape", "Reshape"),
        *("NonZero", "Unique", "Compress", "If", "Loop", "Scan", "SequenceAt"),
        *("TopK", "ScatterElements", "ScatterND", "Scatter"),
    }


@each_case
def test_every_shape_in_the_body_is_known(case: Case) -> None:
    graph = inferred(case)
    infos = [*graph.value_info, *graph.output]
    known = {
        info.name
        for info in infos
        if info.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in info.type.tensor_type.shape.dim)
    }
    assert {name for node in graph.node for name in node.output} <= known


@pytest.mark.parametrize("n", [197, 577])
def test_body_is_as_large_for_any_n(n: int) -> None:
    assert len(inferred(Case(n, 8, 1)).node) == len(inferred(Case(21, 8, 1)).node)


def test_each_site_has_a_body_of_its_own() -> None:
    sites = [(197, 8, 1), (189, 8, 1), (197, 16, 1), (197, 8, 2)]
    bodies = [MERGE.body(n, OPSET, {"r": r, "n_prefix": n_prefix}) for n, r, n_prefix in sites]
    bodies.append(MERGE.body(197, OPSET, {"r": 8, "n_prefix": 1, "raster": 1}))
    assert len({body.identifier() for body in bodies}) == len(sites) + 1
    assert {(body.domain, body.name) for body in bodies} == {("tomexport", "Merge")}


# --- the reference against the rule


@each_case
def test_reference_follows_the_rule(case: Case) -> None:
    x, size, signal = arrays(case)
    merged, merged_size, target = run_reference(case, [x, size, signal])
    for image in range(case.batch):
        rule = slow_match(signal[image], case.r, case.n_prefix, case.raster)
        np.testing.assert_array_equal(target[image], rule)
        values, sizes = slow_merge(x[image], size[image], rule, case.n - case.r)
        np.testing.assert_array_equal(merged_size[image], sizes)
        np.testing.assert_allclose(merged[image], values, rtol=0, atol=1e-6 * abs(values).max())


@st.composite
def exact_problems(draw: Callable) -> tuple[Case, np.ndarray]:
    """Signals of ±1 whose length is a power of two: scores are exact, and many are tied."""
    n_prefix = draw(st.integers(0, 5))
    n = draw(st.integers(n_prefix + 2, 40))
    r = draw(st.integers(1, (n - n_prefix) // 2))
    dim = draw(st.sampled_from([4, 16, 64]))
    groups = draw(st.sampled_from([1, 2, 8]))
    case = Case(n, r, n_prefix, draw(st.integers(1, 3)), dim, groups, channels=3)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    signal = random.choice([-1, 1], (case.batch, 1, n, dim)).astype(np.float32)
    return replace(case, raster=draw(st.booleans())), np.repeat(signal, groups, axis=1)


@given(exact_problems())
def test_match_follows_the_rule(problem: tuple[Case, np.ndarray]) -> None:
    case, signal = problem
    target = reference.match(torch.from_numpy(signal), case.r, case.n_prefix, case.raster)
    rule = [slow_match(image, case.r, case.n_prefix, case.raster) for image in signal]
    np.testing.assert_array_equal(target.numpy(), np.stack(rule))


@given(exact_problems())
def test_target_fills_every_slot(problem: tuple[Case, np.ndarray]) -> None:
    case, signal = problem
    n, r, p = case.n, case.r, case.n_prefix
    for target in reference.match(torch.from_numpy(signal), r, p).numpy():
        hits = np.bincount(target, minlength=n - r)
        assert len(hits) == n - r
        assert hits.min() >= 1
        assert (hits - 1).sum() == r
        np.testing.assert_array_equal(target[:p], range(p))
        set_b = [j for j in range(p, n) if j % 2]
        np.testing.assert_array_equal(target[set_b], range(n - r - len(set_b), n - r))
        assert (hits[: n - r - len(set_b)] == 1).all()  # only tokens of B are merged into


@given(exact_problems())
def test_kept_tokens_keep_their_order_behind_a_prefix(problem: tuple[Case, np.ndarray]) -> None:
    case, signal = problem
    n_b = sum(j % 2 for j in range(case.n_prefix, case.n))
    first_b_slot = case.n - case.r - n_b
    for target in reference.match(torch.from_numpy(signal), case.r, case.n_prefix).numpy():
        set_a = target[case.n_prefix :][np.arange(case.n_prefix, case.n) % 2 == 0]
        kept = set_a[set_a < first_b_slot]
        assert sorted(kept) == list(range(case.n_prefix, first_b_slot))
        if case.n_prefix:
            assert sorted(kept) == list(kept)


@given(exact_problems())
def test_sizes_and_weighted_sums_are_preserved(problem: tuple[Case, np.ndarray]) -> None:
    case, signal = problem
    x, size, _ = arrays(case)
    merged, merged_size, _ = run_reference(case, [x, size, signal])
    np.testing.assert_array_equal(merged_size.sum(1), size.sum(1))
    before = (x.astype(np.float64) * size).sum(1)
    after = (merged.astype(np.float64) * merged_size).sum(1)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6 * (abs(x) * size).sum())


@given(exact_problems(), st.integers(-6, 6))
def test_length_of_the_signal_does_not_matter(problem: tuple[Case, np.ndarray], k: int) -> None:
    case, signal = problem
    power = 2.0 ** (k * (np.arange(case.n) % 3 - 1))[:, None]
    scaled = torch.from_numpy((signal * power).astype(np.float32))
    target = reference.match(torch.from_numpy(signal), case.r, case.n_prefix)
    assert torch.equal(reference.match(scaled, case.r, case.n_prefix), target)


def test_equal_tokens_merge_from_the_front_into_the_first_partner() -> None:
    target = reference.match(torch.ones(1, 2, 9, 4), r=2, n_prefix=1)
    #  prefix 0 · A = 2 4 6 8, of which 2 and 4 merge · B = 1 3 5 7, of which 1 is merged into
    assert target.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


def test_merge_leaves_its_inputs_alone_and_decisions_carry_no_gradient() -> None:
    inputs = Case(41, 10, 1, batch=2).inputs()
    before = [tensor.clone() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    merged, size, target = reference.merge(*leaves, r=10, n_prefix=1)
    assert (merged.requires_grad, size.requires_grad, target.requires_grad) == (True, True, False)
    x_grad, signal_grad = torch.autograd.grad(
        merged.sum(), [leaves[0], leaves[2]], allow_unused=True
    )
    assert x_grad is not None
    assert signal_grad is None
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# --- the margin


def margins(signal: np.ndarray, case: Case) -> np.ndarray:
    found = reference.margin(torch.from_numpy(signal), case.r, case.n_prefix, case.raster)
    return found.numpy()


@given(exact_problems())
def test_margin_is_the_smallest_deciding_difference(problem: tuple[Case, np.ndarray]) -> None:
    case, signal = problem
    expected = [slow_margin(image, case.r, case.n_prefix, case.raster) for image in signal]
    np.testing.assert_array_equal(margins(signal, case), np.array(expected, np.float32))


@pytest.mark.parametrize(
    "case",
    [case for case in cases() if case.directions not in ("few", "one")],
    ids=lambda case: case.name,
)
def test_margin_of_the_cases(case: Case) -> None:
    signal = arrays(case)[2]
    expected = [slow_margin(image, case.r, case.n_prefix, case.raster) for image in signal]
    np.testing.assert_allclose(margins(signal, case), expected, rtol=0, atol=5e-7)


@each_case
def test_ties_have_no_margin_and_other_cases_have_one(case: Case) -> None:
    found = margins(arrays(case)[2], case)
    tied = case.directions in ("few", "one") and case.r > 0
    sound = np.arange(case.batch) != case.broken
    assert (found == 0).all() if tied else (found[sound] > 1e-6).all()


@pytest.mark.parametrize("n_prefix", [0, 1])
def test_tokens_without_direction_are_tied(n_prefix: int) -> None:
    case = Case(41, 10, n_prefix, batch=3, directions="none")
    assert (margins(arrays(case)[2], case) == 0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "case", [Case(2, 1, 0, batch=2), Case(3, 1, 1), Case(9, 0, 0)], ids=lambda c: c.name
)
def test_margin_is_endless_where_nothing_is_decided(case: Case) -> None:
    assert (margins(arrays(case)[2], case) == np.inf).all()


@given(st.integers(0, 2**32 - 1), st.integers(4, 40), st.sampled_from([0, 1, 2]), st.floats(0.1, 1))
def test_noise_below_the_margin_changes_no_decision(
    seed: int, n: int, n_prefix: int, share: float
) -> None:
    case = Case(n, max(1, int(share * (n - n_prefix) // 2)), n_prefix, dim=16)
    random = np.random.default_rng(seed)
    signal = random.standard_normal((1, 1, n, 16))
    (margin,) = margins(signal.astype(np.float32), case)
    assume(margin > 1e-4)  # so that rounding, about 1e-7, is far below it
    # a cosine moves by 2ε at most if both vectors move by ε of their length: less than half of it
    noise = random.standard_normal((1, 1, n, 16))
    noise *= np.linalg.norm(signal, axis=3, keepdims=True)
    noise /= np.linalg.norm(noise, axis=3, keepdims=True)
    disturbed = signal + min(margin, 1) / 5 * noise
    targets = [
        reference.match(torch.from_numpy(m.astype(np.float32)), case.r, n_prefix)
        for m in (signal, disturbed)
    ]
    assert torch.equal(*targets)


# --- photographs


ROUNDING = 2e-6  # of a cosine over 768 values in float32; a smaller margin decides nothing
each_r = pytest.mark.parametrize("r", [8, 49, 98])
each_prefix = pytest.mark.parametrize("n_prefix", [0, 1])
Photographs = Callable[[int], np.ndarray]


def patches_of(images: np.ndarray, n_prefix: int) -> np.ndarray:
    """Patches of 16×16, without their mean, behind n_prefix tokens of ones: (B, N, 768)."""
    grid = images.reshape(len(images), 3, 14, 16, 14, 16).transpose(0, 2, 4, 1, 3, 5)
    patches = grid.reshape(len(images), 196, 768)
    patches = patches - patches.mean(axis=1, keepdims=True)
    return np.pad(patches, ((0, 0), (n_prefix, 0), (0, 0)), constant_values=1)


def assert_equal_where_decided(found: np.ndarray, target: np.ndarray, margin: np.ndarray) -> None:
    decided = margin > ROUNDING
    assert decided.sum() >= 2
    np.testing.assert_array_equal(found[decided], target[decided])
    assert (found != target).mean() < 0.02


@each_r
@each_prefix
def test_reference_follows_the_rule_on_photographs(
    r: int, n_prefix: int, natural_images: Photographs
) -> None:
    signal = patches_of(natural_images(224), n_prefix)[:, None]
    case = Case(196 + n_prefix, r, n_prefix)
    target = reference.match(torch.from_numpy(signal), r, n_prefix).numpy()
    rule = np.stack([slow_match(image, r, n_prefix) for image in signal])
    assert_equal_where_decided(target, rule, margins(signal, case))


@each_form
@each_r
@each_prefix
def test_every_form_computes_the_reference_on_photographs(
    r: int, n_prefix: int, form: Form, natural_images: Photographs
) -> None:
    x = patches_of(natural_images(224), n_prefix)
    case = Case(196 + n_prefix, r, n_prefix, batch=4, dim=768, channels=768)
    inputs = [x, np.ones((4, 196 + n_prefix, 1), np.float32), x[:, None]]
    merged, size, target = run_reference(case, inputs)
    found = form(one_node_model(case), inputs)
    assert_equal_where_decided(found[2], target, margins(inputs[2], case))
    same = (found[2] == target).all(axis=1)
    assert_equal([a[same] for a in found], [merged[same], size[same], target[same]])


@given(exact_problems())
def test_in_raster_order_each_slot_stands_where_its_first_token_stood(
    problem: tuple[Case, np.ndarray],
) -> None:
    case, signal = problem
    signals = torch.from_numpy(signal)
    ordinary = reference.match(signals, case.r, case.n_prefix).tolist()
    raster = reference.match(signals, case.r, case.n_prefix, raster=True).tolist()
    for before, after in zip(ordinary, raster, strict=True):
        firsts = [after.index(slot) for slot in range(case.n - case.r)]
        assert firsts == sorted(firsts)
        assert len({*zip(before, after, strict=True)}) == case.n - case.r  # only the numbers differ
