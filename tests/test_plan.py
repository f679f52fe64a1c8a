"""Schedules and token plans, held against published token counts and MACs."""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tomexport.errors import PlanError
from tomexport.plan import (
    BEFORE,
    TWO_SET,
    Cost,
    Counting,
    ModelCost,
    Plan,
    Schedule,
    Site,
    Step,
    all_but_one,
    keep_of_first,
    two_set_limit,
)

FORMS = (
    "a schedule is none, const:R, linear:R, exp:R_INIT,ALPHA, list:R0,R1,…, keep:SHARE@BLOCK,… "
    "or diffrate:FILE.json."
)
WHOLE = "token counts are whole numbers from 0 up, like 8."
TOO_MANY = "is above 1,000,000, more tokens than a model has."
PLAIN = "write a plain number from 0 to 1, like 0.25."
TWO = (
    "an exponential schedule needs two, the first share and its decay: "
    "exp:0.25,0 merges a quarter of the tokens once."
)
ONE = "this schedule takes one count per block. For a count of its own for each block write list:"


def make(model: ModelCost, schedule: str) -> Plan:
    return Plan.make(model, Schedule.parse(schedule), "tome", TWO_SET)


def vit(
    width: int = 384,
    depth: int = 12,
    tokens: int = 197,
    n_prefix: int = 1,
    *,
    patch: int = 16,
    heads: int = 1,
) -> ModelCost:
    """A plain ViT from its published sizes: MLP four times as wide, `heads` of 1000 classes."""
    cost = Cost(before=4 * width**2, pair=2 * width, after=8 * width**2)
    sites = tuple(
        Site(0, i, f"blocks.{i}", tokens, n_prefix, multiple=1, cost=cost) for i in range(depth)
    )
    stem = (tokens - n_prefix) * width * 3 * patch**2
    return ModelCost("vit", sites, fixed=stem + heads * 1000 * width)


def sret() -> ModelCost:
    """SReT's stages: the tokens of each, the calls of its blocks and its slices."""
    stages = ((784, 4, 8), (196, 10, 4), (49, 6, 1))
    sites = tuple(
        Site(stage, call, f"{stage}.{call}", tokens, 0, multiple, Cost(3, 2, 5))
        for stage, (tokens, n_calls, multiple) in enumerate(stages)
        for call in range(n_calls)
    )
    return ModelCost("sret", sites, fixed=7, pool=11)


def removed(plan: Plan) -> list[int]:
    return [step.removed for step in plan.steps]


def left(plan: Plan) -> list[int]:
    return [step.tokens_out for step in plan.steps]


def by_stage(plan: Plan) -> list[list[Step]]:
    return [list(steps) for _, steps in itertools.groupby(plan.steps, lambda step: step.stage)]


# --- the grammar


READ = {
    "none": ("none", ()),
    "const:0": ("const", (0,)),
    "const:8": ("const", (8,)),
    "const:08": ("const", (8,)),
    "const:1000000": ("const", (1_000_000,)),
    "const: 8": ("const", (8,)),
    " const:8\n": ("const", (8,)),
    "linear:13": ("linear", (13,)),
    "exp:0.25,0": ("exp", (0.25, 0.0)),
    "exp:.5,1.": ("exp", (0.5, 1.0)),
    "exp:1,1": ("exp", (1.0, 1.0)),
    "exp:0,0.000": ("exp", (0.0, 0.0)),
    "exp:0.1, 0.6": ("exp", (0.1, 0.6)),
    "list:5": ("list", (5,)),
    "list:5,0,9,3": ("list", (5, 0, 9, 3)),
    "list:5, 0 ,9": ("list", (5, 0, 9)),
    "keep:0.7@3,6,9": ("keep", (0.7,)),
    "keep:0.7,0.5,.3@3,6,9": ("keep", (0.7, 0.5, 0.3)),
    "keep:0.925": ("keep", (0.925,)),
    "keep:1@0": ("keep", (1.0,)),
}


@pytest.mark.parametrize(
    ("text", "parts"), READ.items(), ids=[f"<{text.strip()}>" for text in READ]
)
def test_schedule_reads(text: str, parts: tuple[str, tuple[float, ...]]) -> None:
    schedule = Schedule.parse(text)
    assert (schedule.kind, schedule.values) == parts
    assert schedule.text == text.strip()
    assert Schedule.parse(schedule.text) == schedule


IN_ORDER = "name each once, in their order, counted from 0, like keep:0.7@3,6,9."
REFUSED = {
    "": f"Unknown schedule ''; {FORMS}",
    "8": f"Unknown schedule '8'; {FORMS}",
    ":8": f"Unknown schedule ':8'; {FORMS}",
    "const 8": f"Unknown schedule 'const 8'; {FORMS}",
    "const=8": f"Unknown schedule 'const=8'; {FORMS}",
    "CONST:8": f"Unknown schedule 'CONST:8'; {FORMS}",
    "constant:8": f"Unknown schedule 'constant:8'; {FORMS}",
    "none:": "'none:': 'none' takes no numbers; write it alone.",
    "none:0": "'none:0': 'none' takes no numbers; write it alone.",
    "const": f"'const': the count is empty; {WHOLE}",
    "const:": f"'const:': the count is empty; {WHOLE}",
    "const: ": f"'const: ': the count is empty; {WHOLE}",
    "const:-8": f"'const:-8': the count is '-8'; {WHOLE}",
    "const:+8": f"'const:+8': the count is '+8'; {WHOLE}",
    "const:8.0": f"'const:8.0': the count is '8.0'; {WHOLE}",
    "const:1e3": f"'const:1e3': the count is '1e3'; {WHOLE}",
    "const:1_0": f"'const:1_0': the count is '1_0'; {WHOLE}",
    "const:1 0": f"'const:1 0': the count is '1 0'; {WHOLE}",
    "const:0x8": f"'const:0x8': the count is '0x8'; {WHOLE}",
    "const:٨": f"'const:٨': the count is '٨'; {WHOLE}",
    "const::8": f"'const::8': the count is ':8'; {WHOLE}",
    "const:1000001": f"'const:1000001': the count {TOO_MANY}",
    "const:99999999999": f"'const:99999999999': the count {TOO_MANY}",
    "const:8,9": f"'const:8,9' has 2 numbers; {ONE}8,9",
    "linear": f"'linear': the count is empty; {WHOLE}",
    "linear:half": f"'linear:half': the count is 'half'; {WHOLE}",
    "linear:8,9,7": f"'linear:8,9,7' has 3 numbers; {ONE}8,9,7",
    "list:": f"'list:': number 1 is empty; {WHOLE}",
    "list:8,": f"'list:8,': number 2 is empty; {WHOLE}",
    "list:8,,4": f"'list:8,,4': number 2 is empty; {WHOLE}",
    "list:8;4": f"'list:8;4': number 1 is '8;4'; {WHOLE}",
    "list:8,4,x": f"'list:8,4,x': number 3 is 'x'; {WHOLE}",
    "list:8,1000001": f"'list:8,1000001': number 2 {TOO_MANY}",
    "exp:0.25": f"'exp:0.25' has 1 number; {TWO}",
    "exp:0.25,0,1": f"'exp:0.25,0,1' has 3 numbers; {TWO}",
    "exp:,0": f"'exp:,0': R_INIT is empty; {PLAIN}",
    "exp:0.25,": f"'exp:0.25,': ALPHA is empty; {PLAIN}",
    "exp:.,0": f"'exp:.,0': R_INIT is '.'; {PLAIN}",
    "exp:-0.25,0": f"'exp:-0.25,0': R_INIT is '-0.25'; {PLAIN}",
    "exp:25%,0": f"'exp:25%,0': R_INIT is '25%'; {PLAIN}",
    "exp:1e-1,0": f"'exp:1e-1,0': R_INIT is '1e-1'; {PLAIN}",
    "exp:nan,0": f"'exp:nan,0': R_INIT is 'nan'; {PLAIN}",
    "exp:0.25,inf": f"'exp:0.25,inf': ALPHA is 'inf'; {PLAIN}",
    "exp:25,0": "'exp:25,0': R_INIT is 25, but it is a share from 0 to 1, like 0.25.",
    "exp:1,1.5": "'exp:1,1.5': ALPHA is 1.5, but it is a share from 0 to 1, like 0.25.",
    "keep": f"'keep': share 1 is empty; {PLAIN}",
    "keep:@3": f"'keep:@3': share 1 is empty; {PLAIN}",
    "keep:0.7@": f"'keep:0.7@': block 1 is empty; {WHOLE}",
    "keep:0.7@a": f"'keep:0.7@a': block 1 is 'a'; {WHOLE}",
    "keep:0.7,2@3,6": "'keep:0.7,2@3,6': share 2 is 2, but it is a share from 0 to 1, like 0.25.",
    "keep:0@3": "'keep:0@3' keeps a share of 0, which is no token at all; write above 0.",
    "keep:0.7@6,3": f"'keep:0.7@6,3' names its blocks as 6,3; {IN_ORDER}",
    "keep:0.7@3,3": f"'keep:0.7@3,3' names its blocks as 3,3; {IN_ORDER}",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=[f"<{t}>" for t in REFUSED])
def test_schedule_refuses(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Schedule.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["exp", "exp:"])
def test_exponential_without_numbers_says_what_it_needs(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Schedule.parse(text)
    assert str(caught.value).startswith(f"{text!r} ")
    assert str(caught.value).endswith(TWO)


@given(
    st.sampled_from(["", "none", "const", "const:", "linear:", "exp:", "list:"]),
    st.text(alphabet="0123456789.,:-+e \n²٣½", max_size=12),
)
def test_schedule_reads_or_refuses_any_text(kind: str, numbers: str) -> None:
    with contextlib.suppress(PlanError):
        assert Schedule.parse(kind + numbers).text == (kind + numbers).strip()


# --- published counts and MACs


COUNTS_OF_DEIT = {
    "const:8": "189 181 173 165 157 149 141 133 125 117 109 101",
    "const:13": "184 171 158 145 132 119 106 93 80 67 54 41",
    "const:16": "181 165 149 133 117 101 85 69 53 37 21 11",
    "linear:13": "171 148 127 109 93 79 68 59 52 48 46 46",
    "linear:16": "165 136 110 87 67 50 36 25 17 12 10 10",
    "exp:0.25,0": "148 148 148 148 148 148 148 148 148 148 148 148",
    "exp:0.1,0.6": "178 167 161 157 155 154 154 154 154 154 154 154",
    "exp:0.3,0": "139 139 139 139 139 139 139 139 139 139 139 139",
    "exp:1,0": "99 99 99 99 99 99 99 99 99 99 99 99",
    "list:5,0,9,3": "192 192 183 180 180 180 180 180 180 180 180 180",
    "none": "197 197 197 197 197 197 197 197 197 197 197 197",
    "const:0": "197 197 197 197 197 197 197 197 197 197 197 197",
}


@pytest.mark.parametrize(("schedule", "counts"), COUNTS_OF_DEIT.items(), ids=COUNTS_OF_DEIT)
def test_counts_of_deit(schedule: str, counts: str) -> None:
    assert left(make(vit(), schedule)) == [int(count) for count in counts.split()]


def test_counts_of_distilled_deit() -> None:
    plan = make(vit(tokens=198, n_prefix=2), "const:13")
    assert left(plan) == [185, 172, 159, 146, 133, 120, 107, 94, 81, 68, 55, 42]


def test_linear_schedule_of_one_site_starts_at_twice_its_count() -> None:
    assert removed(make(vit(depth=1), "linear:13")) == [26]


# the counts that published models of other sizes end with
LAST_COUNTS = {
    "L-r8": (vit(1024, 24), "const:8", [29, 21, 13, 7]),
    "L-r7": (vit(1024, 24), "const:7", [43, 36, 29]),
    "L384-r23": (vit(1024, 24, 577), "const:23", [71, 48, 25]),
    "L384-r25": (vit(1024, 24, 577), "const:25", [52, 27, 14, 8]),
    "H-r7": (vit(1280, 32, 257, patch=14), "const:7", [40, 33]),
    "B384-r45": (vit(768, 12, 577), "const:45", [82, 42]),
    "L512-r40": (vit(1024, 24, 1025), "const:40", [105, 65]),
    "H518-r40": (vit(1280, 32, 1370, patch=14), "const:40", [130, 90]),
    "video": (vit(1024, 24, 1568, 0), "const:65", [73, 37]),
}


@pytest.mark.parametrize(
    ("model", "schedule", "last_counts"), LAST_COUNTS.values(), ids=LAST_COUNTS
)
def test_last_counts_of_larger_models(
    model: ModelCost, schedule: str, last_counts: list[int]
) -> None:
    assert left(make(model, schedule))[-len(last_counts) :] == last_counts


# published multiply-accumulates, to two decimals
GMACS = {
    "S": (vit(), "none", 4.60),
    "S-r8": (vit(), "const:8", 3.42),
    "S-r13": (vit(), "const:13", 2.70),
    "S-r16": (vit(), "const:16", 2.29),
    "S-lin13": (vit(), "linear:13", 2.11),
    "S-lin16": (vit(), "linear:16", 1.54),
    "S-distilled": (vit(tokens=198, n_prefix=2, heads=2), "const:13", 2.73),
    "L-r8": (vit(1024, 24), "const:8", 30.96),
    "L-r7": (vit(1024, 24), "const:7", 34.71),
    "H-r7": (vit(1280, 32, 257, patch=14), "const:7", 92.83),
}


@pytest.mark.parametrize(("model", "schedule", "gmacs"), GMACS.values(), ids=GMACS)
def test_macs_are_the_published(model: ModelCost, schedule: str, gmacs: float) -> None:
    plan = make(model, schedule)
    assert round(plan.macs / 1e9, 2) == gmacs
    assert plan.macs_unreduced == make(model, "none").macs
    assert plan.predicted_speedup == plan.macs_unreduced / plan.macs


# schedule: what each call of the three stages removes, and the total
SRET = {
    "const:10": ("16 16 16 16 | 12 12 12 12 12 12 12 12 12 12 | 10 10 10 9 5 2", 230),
    "const:20": ("24 24 24 24 | 20 20 20 20 20 20 20 20 16 8 | 20 14 7 4 2 1", 328),
    "linear:10": ("24 24 24 16 | 16 16 16 12 12 12 12 8 8 8 | 5 4 3 2 1 0", 223),
    "linear:20": ("40 40 40 40 | 32 32 28 28 24 24 12 8 4 0 | 10 8 6 4 2 0", 382),
    "exp:0.1,0.6": ("80 48 32 16 | 20 12 8 4 4 4 0 0 0 0 | 4 2 1 0 0 0", 235),
    "exp:0.25,0": ("200 0 0 0 | 52 0 0 0 0 0 0 0 0 0 | 12 0 0 0 0 0", 264),
    "exp:0.40,0.2": ("320 64 16 8 | 80 16 4 0 0 0 0 0 0 0 | 19 3 0 0 0 0", 530),
    "exp:0.50,0.5": ("392 192 96 48 | 96 48 24 12 8 4 0 0 0 0 | 24 12 6 3 1 0", 966),
}


@pytest.mark.parametrize(("schedule", "published"), SRET.items(), ids=SRET)
def test_sret_removes_as_published(schedule: str, published: tuple[str, int]) -> None:
    plan = make(sret(), schedule)
    stages = [" ".join(str(step.removed) for step in steps) for steps in by_stage(plan)]
    assert (" | ".join(stages), plan.removed_total) == published


def test_sret_starts_each_stage_with_its_whole_grid() -> None:
    plan = make(sret(), "const:10")
    expected = [768, 752, 736, 720, *range(184, 75, -12), 39, 29, 19, 10, 5, 3]
    assert left(plan) == expected
    assert [step.tokens_in for step in plan.steps if step.call == 0] == [784, 196, 49]


def test_sret_brings_its_tokens_back_where_a_stage_ends() -> None:
    plan = make(sret(), "const:10")
    assert plan.staged
    assert {i: s.restored for i, s in enumerate(plan.steps) if s.restored} == {3: 784, 13: 196}
    assert [s.multiple for s in plan.steps] == [8] * 4 + [4] * 10 + [1] * 6
    one_stage = make(vit(), "const:8")
    assert not one_stage.staged
    assert {s.restored for s in one_stage.steps} == {None}


def test_attention_inside_slices_costs_that_much_less() -> None:
    whole, sliced = Cost(3, 2, 5), Cost(3, 2, 5, slices=8)
    assert whole.macs(16, 12) == 3 * 16 + 2 * 256 + 5 * 12
    assert sliced.macs(16, 12) == 3 * 16 + 2 * 256 // 8 + 5 * 12
    model = ModelCost("any", (Site(0, 0, "b", 16, 0, 8, sliced),), fixed=0)
    assert make(model, "none").steps[0].slices == 8


def test_keys_of_the_whole_grid_cost_the_same_whatever_the_tokens() -> None:
    cost = Cost(
        3, 2, 5, query=1, norm_before=7, keys=4, fixed=100, fixed_query=30, norm_fixed=11
    )  # fmt: skip
    assert cost.macs(16, 12) == 3 * 16 + 2 * 16 * 4 + 5 * 12 + 100
    assert cost.spared(16, 12, 1) == (1 + 2 * 4) * 15 + 5 * 11 + 30
    assert cost.flops_slides(16, 12) == 2 * (3 * 16 + 5 * 12 + 100 + 4 * (7 * 16 + 11))


def test_each_stage_has_prefix_tokens_of_its_own() -> None:
    sites = (Site(0, 0, "a", 16, 0, 1, Cost(3, 2, 5)), Site(1, 0, "b", 5, 1, 1, Cost(3, 2, 5)))
    plan = make(ModelCost("any", sites, fixed=0), "const:9")
    assert [(step.n_prefix, step.tokens_out) for step in plan.steps] == [(0, 8), (1, 3)]
    assert (plan.n_prefix, plan.steps[0].restored) == (1, 16)


def test_steps_that_do_not_say_their_prefix_have_that_of_the_plan() -> None:
    data = make(vit(), "const:8").to_dict()
    data["sites"] = [{k: v for k, v in s.items() if k != "n_prefix"} for s in data["sites"]]
    assert Plan.from_dict(data) == make(vit(), "const:8")


def test_flops_of_the_slides_leave_out_attention_and_count_norms() -> None:
    cost = Cost(before=3, pair=2, after=5, norm_before=7, norm_after=11)
    sites = tuple(Site(0, i, f"b.{i}", 10, 1, 1, cost) for i in range(2))
    model = ModelCost("any", sites, 100, pool=20, pool_products=6, norm_fixed=13, norm_left=17)
    plan = make(model, "list:4,1")
    products = 3 * 10 + 5 * 6 + 3 * 6 + 5 * 5 + 100 + (20 - 6) * 4
    elements = 7 * 10 + 11 * 6 + 7 * 6 + 11 * 5 + 13 + 17 * 5
    assert plan.flops_slides == 2 * (products + 4 * elements)
    assert plan.flops_slides_unreduced == make(model, "none").flops_slides > plan.flops_slides


def test_sret_macs_count_what_attention_mlp_and_pool_see() -> None:
    plan = make(sret(), "exp:0.25,0")
    counts = [(784, 584)] + 3 * [(584, 584)]
    counts += [(196, 144)] + 9 * [(144, 144)]
    counts += [(49, 37)] + 5 * [(37, 37)]
    blocks = [3 * before + 2 * before * before + 5 * after for before, after in counts]
    assert [step.macs for step in plan.steps] == blocks
    assert plan.macs == 7 + sum(blocks) + 11 * 37


@pytest.mark.parametrize(
    ("tokens", "n_prefix", "most"),
    [(197, 1, 98), (198, 2, 98), (196, 0, 98), (201, 5, 98), (3, 1, 1), (2, 1, 0), (1, 5, 0)],
)
def test_two_set_limit_is_half_of_the_mergeable(tokens: int, n_prefix: int, most: int) -> None:
    assert two_set_limit(tokens, n_prefix) == most


def test_another_limit_is_obeyed() -> None:
    model = vit(depth=3, tokens=11)
    plan = Plan.make(model, Schedule.parse("const:6"), "prune", Counting(all_but_one))
    assert (removed(plan), plan.method) == ([6, 3, 0], "prune")


# --- notes


def test_notes_name_every_change_to_the_request() -> None:
    assert make(vit(), "const:16").notes == (
        "capped at the most that can be removed there (blocks.11: 16 → 10)",
    )
    assert make(vit(), "list:5,0,9,3").notes == ("the list names 4 of 12 sites; 0 at the rest",)
    capped, aligned, padded = make(sret(), "list:500,15").notes
    assert capped.endswith("(0.0: 500 → 392)")
    assert aligned == "rounded up, so that the rest divides into slices (0.1: 15 → 16)"
    assert padded == "the list names 2 of 20 sites; 0 at the rest"


@pytest.mark.parametrize(
    "schedule", ["none", "const:13", "linear:13", "list:1,2,3,4,5,6,7,8,9,8,7,6"]
)
def test_no_notes_where_all_is_as_asked(schedule: str) -> None:
    assert make(vit(), schedule).notes == ()


@pytest.mark.parametrize("extra", [1, 5])
def test_list_longer_than_the_model_is_refused(extra: int) -> None:
    schedule = "list:" + ",".join(["1"] * (12 + extra))
    with pytest.raises(PlanError) as caught:
        make(vit(), schedule)
    assert str(caught.value) == (
        f"{schedule} has {12 + extra} numbers, but the model has 12 sites; "
        f"leave out the last {extra}."
    )


# --- properties


@st.composite
def models(draw: Callable) -> ModelCost:
    """Networks of one to three stages; a stage starts with whole slices."""
    n_prefix = draw(st.integers(0, 5))
    costs = st.builds(Cost, *[st.integers(1, 10**6)] * 3)
    sites = []
    for stage in range(draw(st.integers(1, 3))):
        multiple = draw(st.integers(1, 8))
        tokens = multiple * draw(st.integers(-(-(n_prefix + 1) // multiple), 60))
        for call in range(draw(st.integers(1, 8))):
            name = f"stages.{stage}.{call}"
            sites.append(Site(stage, call, name, tokens, n_prefix, multiple, draw(costs)))
    return ModelCost("any", tuple(sites), draw(st.integers(0, 10**9)), draw(st.integers(0, 999)))


@st.composite
def schedules(draw: Callable, longest: int) -> str:
    """Schedules of every kind; a list names `longest` sites at most."""
    count = st.integers(0, 300)
    share = st.decimals(0, 1, places=3)
    form = st.sampled_from(["none", "const", "linear", "exp", "list"])
    values = {
        "none": st.just([]),
        "const": st.lists(count, min_size=1, max_size=1),
        "linear": st.lists(count, min_size=1, max_size=1),
        "exp": st.lists(share, min_size=2, max_size=2),
        "list": st.lists(count, min_size=1, max_size=longest),
    }
    kind = draw(form)
    numbers = ",".join(str(value) for value in draw(values[kind]))
    return f"{kind}:{numbers}" if numbers else kind


@st.composite
def planned(draw: Callable) -> tuple[ModelCost, str]:
    model = draw(models())
    return model, draw(schedules(longest=len(model.sites)))


def best_fit(request: int, tokens: int, n_prefix: int, multiple: int) -> int:
    """What can be removed, found by trying: the least that is enough, else the most there is."""
    if request == 0:
        return 0
    whole = [k for k in range((tokens - n_prefix) // 2 + 1) if (tokens - k) % multiple == 0]
    return min((k for k in whole if k >= request), default=max(whole, default=0))


@given(planned())
def test_each_stage_loses_what_its_steps_remove(case: tuple[ModelCost, str]) -> None:
    model, schedule = case
    plan = make(model, schedule)
    firsts = {site.stage: site.tokens_first for site in model.sites}
    for steps in by_stage(plan):
        assert steps[0].tokens_in == firsts[steps[0].stage]
        assert sum(s.removed for s in steps) == steps[0].tokens_in - steps[-1].tokens_out
        assert all(a.tokens_out == b.tokens_in for a, b in itertools.pairwise(steps))


@given(planned())
def test_tokens_never_rise_nor_fall_below_the_cap(case: tuple[ModelCost, str]) -> None:
    model, schedule = case
    for step, site in zip(make(model, schedule).steps, model.sites, strict=True):
        kept_at_least = site.n_prefix + -(-(step.tokens_in - site.n_prefix) // 2)
        assert kept_at_least <= step.tokens_out <= step.tokens_in
        assert step.removed == step.tokens_in - step.tokens_out


@given(planned())
def test_each_step_removes_the_best_fit(case: tuple[ModelCost, str]) -> None:
    model, schedule = case
    plan = make(model, schedule)
    assert [(s.stage, s.call, s.block) for s in plan.steps] == [
        (s.stage, s.call, s.block) for s in model.sites
    ]
    for step, site in zip(plan.steps, model.sites, strict=True):
        best = best_fit(step.requested, step.tokens_in, site.n_prefix, site.multiple)
        assert step.removed == best


def expected_requests(kind: str, values: Sequence[float], sites: Sequence[Site]) -> list[int]:
    """The requests, each kind by its published formula."""
    n = len(sites)
    r = values[0] if values else 0
    return {
        "none": lambda: [0] * n,
        "const": lambda: [r] * n,
        "linear": lambda: [int(2 * r + (0 - 2 * r) / max(n - 1, 1) * i) for i in range(n)],
        "exp": lambda: [
            int(int((s.tokens_first - s.n_prefix) * r) * values[1] ** s.call) for s in sites
        ],
        "list": lambda: [values[i] if i < len(values) else 0 for i in range(n)],
    }[kind]()


@given(planned())
def test_requests_follow_the_formulas(case: tuple[ModelCost, str]) -> None:
    model, text = case
    schedule = Schedule.parse(text)
    plan = make(model, text)
    expected = expected_requests(schedule.kind, schedule.values, model.sites)
    assert [step.requested for step in plan.steps] == expected
    assert (plan.schedule, plan.model, plan.n_prefix) == (text, "any", model.sites[0].n_prefix)


@given(planned())
def test_macs_are_sums_over_the_steps(case: tuple[ModelCost, str]) -> None:
    model, schedule = case
    plan = make(model, schedule)
    blocks = [
        s.cost.before * t.tokens_in + s.cost.pair * t.tokens_in**2 + s.cost.after * t.tokens_out
        for s, t in zip(model.sites, plan.steps, strict=True)
    ]
    pooled = plan.steps[-1].tokens_out - plan.n_prefix
    assert [step.macs for step in plan.steps] == blocks
    assert plan.macs == model.fixed + sum(blocks) + model.pool * pooled
    assert (plan.macs == plan.macs_unreduced) == (plan.removed_total == 0)
    assert plan.predicted_speedup >= 1


@given(planned())
def test_notes_are_there_exactly_when_needed(case: tuple[ModelCost, str]) -> None:
    model, schedule = case
    plan = make(model, schedule)
    changes = {
        "capped": [s for s in plan.steps if s.removed < s.requested],
        "rounded up": [s for s in plan.steps if s.removed > s.requested],
    }
    is_short = schedule.startswith("list:") and schedule.count(",") + 1 < len(plan.steps)
    expected = [start for start, steps in changes.items() if steps] + ["the list"] * is_short
    assert len(plan.notes) == len(expected)
    for note, start in zip(plan.notes, expected, strict=True):
        assert note.startswith(start)
        for step in changes.get(start, []):
            assert f"{step.block}: {step.requested} → {step.removed}" in note


@given(planned())
def test_plan_survives_json(case: tuple[ModelCost, str]) -> None:
    plan = make(*case)
    text = json.dumps(plan.to_dict())
    assert Plan.from_dict(json.loads(text)) == plan
    assert json.dumps(Plan.from_dict(json.loads(text)).to_dict()) == text


def test_plan_as_data() -> None:
    data = make(vit(depth=2), "const:13").to_dict()
    assert data["removed_total"] == 26
    assert data["predicted_speedup"] == round(data["macs_unreduced"] / data["macs"], 4)
    first, second = data["sites"]
    assert second == first | {
        "block": "blocks.1",
        "call": 1,
        "tokens_in": 184,
        "tokens_out": 171,
        "macs": 12 * 384**2 * 184 - 8 * 384**2 * 13 + 2 * 384 * 184**2,
    }
    assert first["requested"] == first["removed"] == 13


def test_plan_is_not_changed_by_reading_it() -> None:
    data = make(vit(), "const:16").to_dict()
    before = json.dumps(data)
    Plan.from_dict(data)
    assert json.dumps(data) == before


# --- the module


def test_plan_loads_no_numbers_library() -> None:
    heavy = {"torch", "numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "timm"}
    code = f"import sys, tomexport.plan; sys.exit(repr({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_docstring_examples_hold() -> None:
    # by name: the attribute `plan` of the package is the function
    result = doctest.testmod(importlib.import_module("tomexport.plan"))
    assert result.attempted > 0
    assert result.failed == 0


# --- shares to keep


def _kept(schedule: str, counting: Counting = TWO_SET) -> list[int]:
    model = ModelCost("m", tuple(_site(call) for call in range(6)), fixed=0)
    plan = Plan.make(model, Schedule.parse(schedule), "m", counting)
    return [step.tokens_out for step in plan.steps]


def _site(call: int) -> Site:
    return Site(0, call, f"blocks.{call}", 101, 1, 1, Cost(before=10, pair=2, after=20), width=8)


PRUNE = Counting(all_but_one)
FIRST = Counting(all_but_one, keep_of_first, powers=True, place=BEFORE)


@pytest.mark.parametrize(
    ("schedule", "counting", "expected"),
    [
        ("keep:0.7@1,3", PRUNE, [101, 71, 71, 50, 50, 50]),  # 100 → 70 → 49
        ("keep:0.55@0,1", PRUNE, [57, 32, 32, 32, 32, 32]),  # 0.55·100 is above 55: a float
        ("keep:0.9,0.5@1,3", PRUNE, [101, 91, 91, 46, 46, 46]),
        ("keep:0.9", PRUNE, [91, 82, 74, 67, 61, 55]),  # every block: ⌈0.9·90⌉ = 81 …
        ("keep:0.7@1,3,5", FIRST, [101, 71, 71, 49, 49, 35]),  # int(100·0.7²) = 48, a float's
        ("keep:0.7,0.5@1,3", FIRST, [101, 71, 71, 51, 51, 51]),  # of the first, as given
        ("keep:0.3@0", TWO_SET, [51] * 6),  # capped at half
        ("keep:1@2", PRUNE, [101] * 6),
    ],
)
def test_shares_become_counts(schedule: str, counting: Counting, expected: list[int]) -> None:
    assert _kept(schedule, counting) == expected


def test_before_a_block_its_attention_is_cheaper_too() -> None:
    model = ModelCost("m", (_site(0),), fixed=0)
    schedule = Schedule.parse("keep:0.5@0")
    before = Plan.make(model, schedule, "m", dataclasses.replace(FIRST, macs=lambda s, n: n * 7))
    between = Plan.make(model, schedule, "m", PRUNE)
    assert (before.steps[0].place, before.steps[0].attended) == ("before", 51)
    assert before.macs == 51 * 10 + 51**2 * 2 + 51 * 20 + 101 * 7
    assert between.macs == 101 * 10 + 101**2 * 2 + 51 * 20


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("keep:0.7@3,6", "names block 6, but the model has 6 blocks, 0 to 5"),
        ("keep:0.7,0.5@1,3,5", "has 2 shares for 3 blocks"),
        ("keep:0.7,0.5", "has 2 shares for 6 blocks"),
    ],
)
def test_shares_that_do_not_fit_the_blocks(schedule: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        _kept(schedule)
