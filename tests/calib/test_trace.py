"""Which patches stand together: composed as one would walk, from what a file itself decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import tomexport
from tomexport.calib.trace import NOWHERE, Tracer, frames, grid
from tomexport.errors import ArtifactError, ExportError
from tomexport.plan import Plan, Step

SIZE = (32, 48)  # pixels; 2 × 3 patches of 16


def _step(tokens_in, removed, restored=None, stage=0, n_prefix=0):
    return Step(
        "blocks.0", stage, 0, tokens_in, removed, removed, tokens_in - removed, 1,
        restored=restored, n_prefix=n_prefix,
    )  # fmt: skip


def _plan(*steps, macs_spared=0):
    n_prefix = steps[-1].n_prefix
    return Plan("model", "method", "schedule", n_prefix, steps, 1, 1, macs_spared)


def _groups(plan, *targets, size=SIZE):
    maps = [np.array(target) for target in targets]
    return [(f.tokens, f.groups.ravel().tolist()) for f in frames(plan, maps, size)]


def test_maps_are_composed_and_numbered_by_first_patches():
    plan = _plan(_step(7, 2, n_prefix=1), _step(5, 0, n_prefix=1), _step(5, 2, n_prefix=1))
    # patches 1 and 4, 0 and 5 merge; then 2 joins 1 and 4, and 3 joins 0 and 5
    first, second = [0, 4, 3, 1, 2, 3, 4], [0, 1, 2, 1, 2]
    assert _groups(plan, first, second) == [
        (5, [0, 1, 2, 3, 1, 0]),
        (5, [0, 1, 2, 3, 1, 0]),
        (3, [0, 1, 1, 0, 1, 0]),
    ]


def test_what_was_dropped_stays_dropped():
    plan = _plan(_step(6, 2), _step(4, 1))
    assert _groups(plan, [NOWHERE, 0, 1, NOWHERE, 2, 3], [1, 0, NOWHERE, 2]) == [
        (4, [-1, 0, 1, -1, 2, 3]),
        (3, [-1, 0, 1, -1, -1, 2]),
    ]
    first, last = frames(plan, [np.array([-1, 0, 1, -1, 2, 3]), np.array([1, 0, -1, 2])], SIZE)
    assert [(f.merged, f.gone, f.waiting) for f in (first, last)] == [(0, 2, False), (0, 3, False)]


def test_those_that_waited_come_back():
    plan = _plan(_step(6, 3), _step(3, 0, restored=6), _step(6, 3, restored=6))
    one, other = [0, NOWHERE, 1, NOWHERE, 2, NOWHERE], [NOWHERE, 0, 1, NOWHERE, NOWHERE, 2]
    assert _groups(plan, one, other) == [
        (3, [0, -1, 1, -1, 2, -1]),
        (3, [0, -1, 1, -1, 2, -1]),
        (3, [-1, 0, 1, -1, -1, 2]),
    ]
    assert all(f.waiting for f in frames(plan, [np.array(one), np.array(other)], SIZE))


def test_each_stage_has_a_grid_of_its_own():
    size = (32, 64)
    # with a class token in the last
    last = [_step(3, n, stage=1, n_prefix=1) for n in (0, 1)]
    plan = _plan(_step(8, 4, restored=8), *last)
    stages = list(frames(plan, [np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 1, 1])], size))
    assert [f.groups.tolist() for f in stages] == [
        [[0, 0, 1, 1], [2, 2, 3, 3]],
        [[0, 1]],
        [[0, 0]],
    ]
    assert [f.tokens for f in stages] == [4, 3, 2]
    assert not stages[0].waiting, "that a stage ends is no waiting"


def test_a_reduction_that_the_file_leaves_out_changes_nothing():
    plan = _plan(_step(6, 3), _step(3, 1), macs_spared=1)  # only the class token is read at the end
    assert _groups(plan, [0, 0, 1, 1, 2, 2]) == 2 * [(3, [0, 0, 1, 1, 2, 2])]


@pytest.mark.parametrize(
    ("n_patches", "size", "expected"),
    [
        (196, (224, 224), (14, 14)),
        (784, (224, 224), (28, 28)),
        (729, (384, 384), (27, 27)),  # patches of 14; 6 pixels are left over
        (24, (32, 48), (4, 6)),
        (280, (224, 320), (14, 20)),
    ],
)
def test_grids(n_patches, size, expected):
    assert grid(n_patches, size) == expected


def test_patches_that_are_not_square_are_refused():
    with pytest.raises(ArtifactError, match=r"32×48 pixels are not square"):
        grid(7, SIZE)


# --- in files


def _walked(n_tokens, targets):
    """Follow each token through all maps, one by one."""
    places = []
    for place in range(n_tokens):
        for target in targets:
            place = NOWHERE if place == NOWHERE else int(target[place])
        places.append(place)
    return places


def _numbered(places):
    """Number places by the first patch in each."""
    numbers = {place: i for i, place in enumerate(dict.fromkeys(p for p in places if p >= 0))}
    return [numbers.get(place, NOWHERE) for place in places]


@pytest.fixture(scope="module")
def traced(seeded, tmp_path_factory) -> Path:
    """A file that gives out its target maps."""
    path = tmp_path_factory.mktemp("traced") / "model.onnx"
    report = tomexport.export(seeded("test_vit"), "const:16", path, trace=True)
    assert report.verify.passed
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_file_tells_where_its_tokens_went(traced, backend):
    tracer = Tracer.load(traced, backend, precision="f32")
    golden = tracer.golden
    for index in (0, 5):
        found = tracer(golden.images[index])
        assert len(found) == 6
        places = _walked(101, [target[index] for target in golden.targets])
        assert found[-1].groups.ravel().tolist() == _numbered(places[1:])
        tokens = [step.tokens_out for step in tracer.metadata.plan.steps]
        assert [f.tokens for f in found[:-1]] == tokens[:-1]


def test_outputs_that_users_can_read(traced):
    session = onnxruntime.InferenceSession(traced)
    names = [output.name for output in session.get_outputs()]
    golden = Tracer.load(traced).golden
    assert names[1:] == [f"decision_{i}" for i in range(5)]
    found = session.run(names[1:], {"image": golden.images[:1]})
    for target, expected in zip(found, golden.targets, strict=True):
        assert np.array_equal(target, expected[:1])


def test_what_a_trace_adds_is_given_when_it_is_asked_for(traced):
    image = np.zeros((1, 3, 160, 160), np.float32)
    for backend in ("onnxruntime", "openvino"):
        assert len(tomexport.load(traced, backend).outputs(image)) == 1
        asked = tomexport.load(traced, backend, extra_outputs=("decision_3", "decision_1"))
        assert [out.shape[1] for out in asked.outputs(image)[1:]] == [101 - 48, 101 - 16]


@pytest.mark.native
def test_a_trace_keeps_the_kernels(traced, fused):
    report = tomexport.verify(traced)
    assert report.passed
    assert {run.backend for run in report.runs if run.kernels} == {"onnxruntime", "openvino"}


@pytest.mark.parametrize("schedule", ["none", "const:8"])
def test_files_that_choose_nothing_are_refused(seeded, tmp_path, schedule):
    path = tmp_path / "model.onnx"
    method = "tome" if schedule == "none" else "random"
    with pytest.raises(ExportError, match="There is no choice of tokens to trace"):
        tomexport.export(seeded("test_vit"), schedule, path, method=method, trace=True)
    assert not path.exists()
    tomexport.export(seeded("test_vit"), schedule, path, method=method, verify=False)
    with pytest.raises(ArtifactError, match="has no choice of tokens to show"):
        Tracer.load(path)


def test_waiting_tokens_in_a_file_of_any_batch(seeded, tmp_path):
    path = tmp_path / "model.xml"
    model = seeded("test_vit", global_pool="avg")
    tomexport.export(
        model, "keep:0.5@2,4", path, method="evo-vit", batch=2, trace=True, verify=False
    )
    tracer = Tracer.load(path, precision="f32")
    found = tracer(tracer.golden.images[0])
    assert [f.gone for f in found] == [0, 0, 50, 50, 50, 50]
    assert all(f.waiting for f in found)
    for frame, target in ((found[3], 0), (found[5], 1)):
        away = tracer.golden.targets[target][0][1:] == NOWHERE
        assert np.array_equal(frame.groups.ravel() == NOWHERE, away)
