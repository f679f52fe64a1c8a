"""What can be tried: methods, precisions, and schedules on grids, so that the space is finite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from tomexport.errors import pick, require_known
from tomexport.plan import Plan

Choices = dict[str, Any]  # of a trial, by the names that the storage has for them

_STEPS = [i / 20 for i in range(1, 20)]  # 0.05 … 0.95


@dataclass(frozen=True)
class Family:
    """A kind of schedule.

    Attributes:
        name: "const", "linear", "exp", "keep", "list" or "none".
        grids: (tokens to merge, block calls) → the values of each of its parameters.
        text: (block calls, **values) → the schedule; of "list" only the share of the MACs, for
            which a list is searched.
    """

    name: str
    grids: Callable[[int, int], dict[str, list[Any]]]
    text: Callable[..., str]


def _counts(tokens: int, n: int) -> dict[str, list[Any]]:
    """Up to a count that would leave nothing but for the caps."""
    return {"r": list(range(1, max(2, round(1.2 * tokens / n)) + 1))}


def _keep_at(n: int, places: int) -> str:
    """Return as many block calls, evenly spread: of 12, one is 3, three are 3, 6 and 9."""
    chosen = [n // 4] if places == 1 else sorted({n // 4, n // 2, 3 * n // 4})
    return ",".join(map(str, chosen))


NONE = Family("none", lambda tokens, n: {}, lambda n: "none")
CONST = Family("const", _counts, lambda n, r: f"const:{r}")
LINEAR = Family("linear", _counts, lambda n, r: f"linear:{r}")
EXP = Family(
    "exp",
    lambda tokens, n: {
        "r_init": [v for v in _STEPS if v <= 0.5],  # two-set matching merges no more at once
        "alpha": [i / 10 for i in range(10)],
    },
    lambda n, r_init, alpha: f"exp:{r_init:g},{alpha:g}",
)
KEEP = Family(
    "keep",
    lambda tokens, n: {"share": [v for v in _STEPS if v >= 0.3], "places": [1, 3]},
    lambda n, share, places: f"keep:{share:g}@{_keep_at(n, places)}",
)
LIST = Family(
    "list",
    lambda tokens, n: {"macs": [v for v in _STEPS if v >= 0.4]},
    lambda n, macs: f"list:{macs:g}",
)
FAMILIES = (NONE, CONST, LINEAR, EXP, KEEP, LIST)
EVERY = tuple(family.name for family in FAMILIES)


@dataclass(frozen=True)
class Point:
    """What a trial measures.

    Attributes:
        method, schedule, precision: as on the command line.
        removed: tokens removed at each block call; which points are the same, this tells.
        gmac: multiply-accumulates of an image, in 10⁹.
    """

    method: str
    schedule: str
    precision: str
    removed: tuple[int, ...]
    gmac: float

    @classmethod
    def of(cls, plan: Plan, precision: str) -> Point:
        """Return the point of a plan."""
        removed = tuple(step.removed for step in plan.steps)
        return cls(plan.method, plan.schedule, precision, removed, round(plan.macs / 1e9, 4))

    @property
    def key(self) -> str:
        """What points that compute the same have in common."""
        method = self.method if any(self.removed) else ""
        return f"{method} {self.precision} {','.join(map(str, self.removed))}"


@dataclass(frozen=True)
class Space:
    """All that can be tried.

    Attributes:
        methods, families, precisions: what there is to choose from.
        tokens: tokens that can merge, at the start.
        n_calls: block calls.
    """

    methods: tuple[str, ...]
    families: tuple[str, ...]
    precisions: tuple[str, ...]
    tokens: int
    n_calls: int

    def __post_init__(self) -> None:
        for name in self.families:
            require_known("family of schedules", name, [family.name for family in FAMILIES])

    def to_dict(self) -> dict[str, Any]:
        """Return the space as plain JSON data, its grids among them."""
        grids = {name: self._grids(name) for name in self.families}
        data: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"grids": grids}))
        return data

    def draw(self, trial: Any) -> Choices:
        """Let a trial of Optuna's choose: names as they are, numbers by their place on the grid."""
        family = trial.suggest_categorical("family", list(self.families))
        trial.suggest_categorical("method", list(self.methods))
        trial.suggest_categorical("precision", list(self.precisions))
        for parameter, values in self._grids(family).items():
            trial.suggest_int(parameter, 0, len(values) - 1)
        choices: Choices = trial.params
        return choices

    def all(self) -> Iterator[Choices]:
        """Go through all choices."""
        for family in self.families:
            grids = self._grids(family)
            for method, precision in product(self.methods, self.precisions):
                fixed = {"family": family, "method": method, "precision": precision}
                for places in product(*(range(len(values)) for values in grids.values())):
                    yield fixed | dict(zip(grids, places, strict=True))

    def schedule(self, choices: Choices) -> str:
        """Write the schedule of a choice; of a list only the share of MACs."""
        family = pick("family of schedules", FAMILIES, choices["family"])
        grids = self._grids(family.name)
        values = {name.partition(".")[2]: grid[choices[name]] for name, grid in grids.items()}
        return family.text(self.n_calls, **values)

    def share(self, choices: Choices) -> float:
        """Return the share of the MACs that a choice of a list may have."""
        share: float = self._grids(LIST.name)["list.macs"][choices["list.macs"]]
        return share

    def _grids(self, name: str) -> dict[str, list[Any]]:
        family = pick("family of schedules", FAMILIES, name)
        grids = family.grids(self.tokens, self.n_calls)
        return {f"{name}.{parameter}": values for parameter, values in grids.items()}
