"""Lists: what they cost, what they change, and that searching them finds no worse ones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import tomexport
from tomexport import pipeline
from tomexport.calib.images import ImageSet
from tomexport.calib.search import lists
from tomexport.calib.search.lists import Arithmetic, Bench, as_schedule, search_list
from tomexport.errors import PlanError
from tomexport.exporter.families import family_of
from tomexport.exporter.source import find
from tomexport.plan import TWO_SET


@pytest.fixture(scope="module")
def found(digits):
    return find(digits.checkpoint)


@pytest.fixture(scope="module")
def rules(found):
    return Arithmetic(family_of(found.model).cost(found.model, found.name), TWO_SET)


@pytest.fixture(scope="module")
def make_bench(digits, merged, found):
    pixels, _ = ImageSet.find(digits.held_out, limit=40)(pipeline.describe(merged))
    with torch.no_grad():
        reference = digits.model(torch.from_numpy(pixels)).numpy()
    return lambda: Bench(
        lambda text: tomexport.reduce(found, text), pixels, reference
    )  # fmt: skip


def test_a_list_that_fits_cannot_remove_less(rules):
    for shape in ([1] * 6, [0, 0, 1, 2, 3, 0], [5, 0, 0, 1, 0, 0]):
        counts = rules.fit(shape, int(0.8 * rules.most))
        assert rules.macs(counts) <= 0.8 * rules.most
        for i in rules.free:
            less = [count - (i == j) for j, count in enumerate(counts)]
            assert counts[i] == 0 or rules.macs(less) > 0.8 * rules.most


def test_the_last_block_is_left_alone_where_only_the_class_token_is_read(rules):
    assert rules.n == 6
    assert rules.free == range(5)
    assert rules.removed("const:4") == (4, 4, 4, 4, 4, 0)


def test_what_goes_on_from_a_common_beginning_is_what_runs_whole(make_bench):
    bench = make_bench()
    drawn = np.random.default_rng(0).integers(0, 9, size=(6, 6))
    drawn[1:3, :3], drawn[4, :5] = drawn[0, :3], drawn[3, :5]
    wanted = [make_bench().loss(tuple(counts)) for counts in drawn.tolist()]
    for base in (drawn[0], drawn[3], drawn[4]):
        bench.rebase(tuple(base.tolist()))
        bench._known.clear()
        found = [bench.loss(tuple(counts)) for counts in drawn.tolist()]
        assert found == pytest.approx(wanted, abs=1e-7)
    assert min(wanted) > 0


def test_nothing_removed_changes_nothing(make_bench):
    assert make_bench().loss((0,) * 6) == pytest.approx(0, abs=1e-6)


def test_a_search_is_never_worse_than_what_it_starts_from(rules, make_bench):
    budget = rules.plan("const:6").macs
    found = search_list(
        make_bench(), make_bench(), rules, budget, evaluations=25, starts=["const:6"]
    )
    counts = rules.removed(found.schedule)
    assert rules.macs(counts) <= budget
    assert found.loss == pytest.approx(make_bench().loss(counts), abs=1e-5)
    held_out = (found.held_out_loss, found.exponential_held_out_loss)  # here, of the same images
    assert held_out == pytest.approx((found.loss, found.exponential_loss), abs=1e-5)
    assert found.loss <= found.start <= make_bench().loss(rules.removed("const:6")) + 1e-5
    assert found.start <= found.exponential_loss
    assert rules.plan(found.exponential).macs <= budget
    assert found.evaluations > 20


def test_each_block_that_can_remove_more_has_a_price(rules, make_bench):
    full = rules.removed("list:32,4,4,4,4,0")  # no more than half of 64 can go at once
    prices = lists._prices(make_bench(), rules, full)
    assert set(prices) == {1, 2, 3, 4}
    assert min(prices.values()) >= 0
    assert max(prices.values()) > 0


def test_a_block_that_asks_more_gets_less(rules):
    counts = (6, 6, 6, 6, 6, 0)
    prices = dict(zip(range(5), (2.0, 1.0, 1.0, 1.0, 1.0), strict=True))
    stepped = next(lists._stepped(rules, rules.macs(counts), counts, prices))
    assert stepped[0] < 6
    assert max(stepped[1:5]) > 6
    assert rules.macs(stepped) <= rules.macs(counts)
    alike = dict.fromkeys(range(5), 1.0)
    assert set(lists._stepped(rules, rules.macs(counts), counts, alike)) == {counts}


def test_a_step_that_comes_down_to_no_list_is_left_out(rules):
    budget, counts = int(0.4 * rules.most), (1, 1, 1, 1, 20, 0)
    prices = dict(zip(range(5), (9.0, 9.0, 9.0, 9.0, 0.1), strict=True))
    # only the last would remove anything, which is too late
    assert list(lists._stepped(rules, budget, counts, prices)) == []
    stepped = list(lists._stepped(rules, int(0.95 * rules.most), counts, prices))
    assert len(stepped) == len(lists._STEPS)


def test_one_block_takes_over_what_another_removed(rules):
    counts = rules.removed("list:6,6,6,6,6,0")
    budget = rules.macs(counts)
    changed = lists._exchanged(rules, budget, counts, 3, 1, 4)
    assert [a != b for a, b in zip(changed, counts, strict=True)] == [0, 1, 0, 1, 0, 0]
    assert (changed[3], changed[1] < 6) == (10, True)
    less = [*changed[:1], changed[1] - 1, *changed[2:]]
    assert rules.macs(changed) <= budget < rules.macs(less)
    assert lists._exchanged(rules, budget, rules.removed("list:6,0,6,6,6,0"), 3, 1, 4) is None


def test_exchanges_go_on_where_no_step_helps(rules, monkeypatch):
    aim = rules.removed("list:2,12,3,9,1,0")
    budget = rules.macs(aim)

    class Known:
        n_images, evaluations = 4, 0

        def first(self, n):
            return self

        def rebase(self, counts):
            pass

        def loss(self, counts):
            self.evaluations += 1
            return sum((a - b) ** 2 for a, b in zip(counts, aim, strict=True))

    def found():
        start = rules.fit([1, 1, 1, 1, 1, 0], budget)
        return lists._descend(Known(), rules, budget, start, 2000, print, print)

    best = found()
    monkeypatch.setattr(lists, "_EXCHANGED", ())
    by_steps = found()
    assert Known().loss(best) < Known().loss(by_steps)
    assert rules.macs(best) <= budget


def test_late_lists_begin_one_block_after_the_other(rules):
    late = lists._late(rules, int(0.8 * rules.most))
    first = [next(i for i, count in enumerate(counts) if count) for counts in late]
    assert all(b == a + 1 for a, b in pairwise(first))
    assert first[0] == 0


def test_what_no_list_comes_down_to(rules, make_bench):
    with pytest.raises(PlanError, match="No list of this form comes down to"):
        rules.fit([0, 0, 0, 0, 1, 0], int(0.5 * rules.most))
    with pytest.raises(PlanError, match="No exponential schedule comes down to"):
        search_list(make_bench(), make_bench(), rules, int(0.1 * rules.most), evaluations=1)


def test_a_list_is_written_as_a_schedule():
    assert as_schedule((1, 0, 3)) == "list:1,0,3"
