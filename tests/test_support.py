"""SUPPORT.md is what the survey gives today: right, or refused with a reason."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from benchmarks.support import names, page, pairs, published
from benchmarks.support.state import State

RUN = "run: python -m benchmarks.support"


@pytest.fixture(scope="module")
def state():
    return State.load()


def test_the_page_is_of_what_there_is_today(state):
    assert page.is_complete(state), RUN
    assert page.TARGET.read_text() == page.page(state), RUN


def test_every_name_is_right_or_refused(state):
    assert len(state.names) == 293
    assert sum(row.is_right for row in state.names.values()) >= 250
    for row in state.names.values():
        assert row.is_right or row.none.startswith("refused: ")


def test_every_pair_is_right_approximate_or_refused(state):
    verdicts = {p.verdict.partition(": ")[0] for of in state.pairs.values() for p in of.values()}
    assert verdicts == {names.RIGHT, pairs.APPROXIMATE, "refused"}


def test_what_the_page_says_of_nothing_removed_holds(state):
    """Of every sixth set of parts one name; the survey takes all."""
    of_parts = {(row.parts, row.none): name for name, row in state.names.items()}
    for (parts, verdict), name in list(of_parts.items())[::6]:
        model = names.small(name, depth=2)
        assert (names.parts(model), names.verdict(model)) == (parts, verdict), (
            f"{RUN} --names {name}"
        )


@pytest.mark.parametrize(
    "name",
    ["vit_pe_core_tiny_patch16_384", "vit_relpos_small_patch16_rpn_224",
     "naflexvit_base_patch16_par_gap", "vit_base_patch16_xp_224"],
)  # fmt: skip
def test_what_the_page_says_of_merging_holds(state, name):
    model = names.small(name, depth=2)
    assert names.merged_verdict(model) == state.names[name].merged == names.RIGHT


@pytest.mark.parametrize("family", pairs.families())
def test_what_the_page_says_of_refused_methods_holds(state, family):
    """Those that are right take long: see the next test."""
    model = pairs.model_of(family)
    for method, pair in state.pairs[family].items():
        if pair.verdict.startswith("refused"):
            assert pairs.verdict(model, method) == pair.verdict, RUN
        else:
            pairs.reduced_by(model, method)


@pytest.mark.parametrize("method", ["evit", "dtem", "diffrate"])
def test_what_the_page_says_of_methods_holds(state, method):
    assert pairs.verdict(pairs.model_of("relpos"), method) == state.pairs["relpos"][method].verdict


@pytest.mark.parametrize("test", sorted({*pairs.SHOWN_BY.values(), pairs.SIGNALS_SHOWN_BY}))
def test_the_tests_it_names_exist(test):
    path, _, function = test.partition("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert callable(getattr(module, function))


@pytest.mark.parametrize("figure", published.FIGURES, ids=str)
def test_macs_are_the_published_or_it_says_why_not(figure):
    assert set(figure.method.split()) <= {f"{name}" for name in pairs.methods()} | {"evit:fuse=no"}
    if figure.ours is None or figure.gmacs == "–":
        assert figure.why or figure.gmacs == "–"
    else:
        assert figure.agrees or figure.why


# --- the survey must be able to fail


def test_a_wrong_number_would_be_seen():
    """A block without its LayerScale is told from a right one."""
    from tomexport.exporter.families import vit

    model = names.small("deit3_small_patch16_224")
    assert names.verdict(model) == names.RIGHT
    right = vit.VIT.mlp

    def without_scale(call, x):
        return x + call.block.mlp(call.block.norm2(x))

    object.__setattr__(vit.VIT, "mlp", without_scale)
    try:
        assert names.verdict(model).startswith("WRONG")
    finally:
        object.__setattr__(vit.VIT, "mlp", right)


def test_sizes_that_do_not_add_up_would_be_seen(monkeypatch):
    def forgetful(view):
        left = tome.reduce(view)
        return left._replace(size=left.size.clamp(max=1))

    tome = names.TOME
    monkeypatch.setattr(names, "TOME", dataclasses.replace(tome, reduce=forgetful))
    assert names.merged_verdict(names.small("test_vit")).startswith("WRONG: sizes add up to")


def test_a_runtime_that_computes_otherwise_would_be_seen(monkeypatch):
    run = pairs._in_openvino
    monkeypatch.setattr(pairs, "_in_openvino", lambda content, image: run(content, image) * 1.001)
    monkeypatch.setattr(pairs, "_KEEP", "keep:0.7@1")
    assert pairs.verdict(pairs.model_of("vit"), "topk").startswith("WRONG by")
