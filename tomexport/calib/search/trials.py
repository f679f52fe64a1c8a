"""One trial after the other: what was drawn is planned, searched if it is a list, and measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tomexport import pipeline
from tomexport.calib.search.front import Limits, Measured
from tomexport.calib.search.measure import Meter, Prepared
from tomexport.calib.search.space import Choices, Point, Space
from tomexport.calib.search.study import Claimed, Study
from tomexport.errors import ArtifactError, PlanError, RewriteError, plain
from tomexport.plan import ModelCost, Plan, Schedule

if TYPE_CHECKING:
    from tomexport.calib.search.lists import Arithmetic, Found
    from tomexport.exporter.methods.method import Method

Progress = Callable[[str], None]
_LIST = "list of"  # what notes of lists start with in a storage
_SO_FAR = "so far, "  # and those of lists that are still searched


@dataclass(frozen=True)
class Trier:
    """Takes one trial of a study after the other.

    Attributes:
        study: where trials are claimed and kept.
        space: what can be tried.
        meter: measures a point.
        images: on which points are judged.
        limits: what a file may cost.
        unmerged_ms: the median time of a call of the unmerged file.
        evaluations: lists to compute for each share of MACs.
        progress: is told what is being done.
    """

    study: Study
    space: Space
    meter: Meter
    images: Prepared
    limits: Limits
    unmerged_ms: float
    evaluations: int
    progress: Progress

    @cached_property
    def _cost(self) -> ModelCost:
        from tomexport.exporter.families import family_of

        found = self.meter.found
        return family_of(found.model).cost(found.model, found.name)

    @cached_property
    def _methods(self) -> dict[str, Method]:
        return {name: pipeline.method_of(self.meter.found, name) for name in self.space.methods}

    def run(self, trials: int | None, minutes: float | None) -> bool:
        """Go on until the budget is used; return whether everything has been tried before."""
        end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            done = self.study.n_taken()
            if trials is not None and done >= trials:
                return False
            claimed = self.study.claim(self._describe)
            if claimed is None:
                return True
            of = "" if trials is None else f" of {trials}"
            schedule = self.space.schedule(claimed.choices)
            self.progress(f"trial {done + 1}{of}: {schedule}")
            self._try(claimed)
        return False

    def _try(self, claimed: Claimed) -> None:
        try:
            point = self._point(claimed.choices)
            measured = self._known(point) or self.meter.measure(point, self.images)
        except (PlanError, RewriteError) as err:
            self.study.refuse(claimed, str(err))
            return
        except BaseException:
            self.study.drop(claimed)
            raise
        excess = self.limits.excess(measured, self.unmerged_ms)
        values = (measured.ratio.value, measured.loss)
        self.study.finish(claimed, measured.to_dict(), values, excess)

    def _known(self, point: Point) -> Measured | None:
        """Return what this kind of machine has measured of the same point under another name."""
        results = map(Measured.from_dict, self.study.results())
        return next((each for each in results if each.point.key == point.key), None)

    def _describe(self, choices: Choices) -> str | None:
        """Return what the same points have in common; None for what cannot be or is too much."""
        if choices["family"] == "list":
            return f"{choices['precision']} {self._list_key(choices)}"
        try:
            point = self._planned(choices, self.space.schedule(choices))
        except PlanError:
            return None
        too_much = self.limits.gmac is not None and point.gmac > self.limits.gmac
        return None if too_much and choices["family"] != "none" else point.key

    def _planned(self, choices: Choices, schedule: str) -> Point:
        method = self._methods[choices["method"]]
        plan = Plan.make(self._cost, Schedule.parse(schedule), method.name, method.counting)
        return Point.of(plan, choices["precision"])

    def _point(self, choices: Choices) -> Point:
        if choices["family"] == "list":
            return self._planned(choices, self._list(choices).schedule)
        return self._planned(choices, self.space.schedule(choices))

    def _budget(self, choices: Choices) -> int:
        """Return the MACs of a list: its share of all, or the limit if that is less."""
        most = self.meter.metadata.plan.macs_unreduced
        limit = math.inf if self.limits.gmac is None else self.limits.gmac * 1e9
        return int(min(limit, self.space.share(choices) * most))

    def _list_key(self, choices: Choices) -> str:
        return f"{_LIST} {choices['method']}, {self._budget(choices)} MACs"

    def _list(self, choices: Choices) -> Found:
        """Return the best list for a share of the MACs, searched unless the storage has it."""
        key = self._list_key(choices)
        if key not in self.study.notes(key):
            self.study.write_note(key, dataclasses.asdict(self._search_list(choices)))
        return _read(key, self.study.notes(key)[key])

    def _search_list(self, choices: Choices) -> Found:
        from tomexport.calib.search import lists

        method = choices["method"]
        rules = lists.Arithmetic(self._cost, self._methods[method].counting)
        bench, held_out = (
            lists.Bench(
                lambda schedule: pipeline.reduce(self.meter.found, schedule, method=method),
                half.pixels, half.outputs,
            )
            for half in (self.images.search, self.images.held_out)
        )  # fmt: skip
        so_far = f"{_SO_FAR}{self._list_key(choices)}"
        return lists.search_list(
            bench, held_out, rules, self._budget(choices), evaluations=self.evaluations,
            starts=self._starts(choices, rules, so_far), progress=self.progress,
            keep=lambda schedule: self.study.write_note(so_far, schedule),
        )  # fmt: skip

    def _starts(self, choices: Choices, rules: Arithmetic, so_far: str) -> list[str]:
        """Return what other methods, and a search that was stopped, came to with as many MACs."""
        budget = self._budget(choices)
        lists = [
            _read(key, noted).schedule
            for key, noted in self.study.notes(_LIST).items() if key.endswith(f", {budget} MACs")
        ]  # fmt: skip
        with reading(so_far):
            lists += self.study.notes(so_far).values()
            return [text for text in lists if rules.plan(text).macs <= budget]


def _read(key: str, noted: Any) -> Found:
    from tomexport.calib.search.lists import Found

    with reading(key):
        found = Found(**noted)
        Schedule.parse(found.schedule)
        float(found.held_out_loss), float(found.exponential_held_out_loss)
    return found


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Turn what reading a note raises into an error that names it."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, PlanError) as err:
        raise ArtifactError(
            f"The {key} in the storage is damaged ({plain(err)}); name another storage."
        ) from err


def said_of_lists(study: Study) -> list[str]:
    """Say whether lists were better than exponential schedules of the same MACs."""
    found = [_read(key, noted) for key, noted in study.notes(_LIST).items()]
    nearer = sum(each.held_out_loss < each.exponential_held_out_loss for each in found)
    said = (
        f"at {nearer} of {len(found)} budgets of MACs the list that was found is nearer to the "
        "unmerged outputs than the best exponential schedule, on the images held out"
    )
    return [said] if found else []
