"""What the pages share: figures with their intervals, tables, and the README's marks."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency.cases import NONE
from benchmarks.latency.results import Results
from tomexport.runtime.profile import percent, times
from tomexport.runtime.timing import Interval

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
_ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch, eager"}
Record = dict[str, Any]
Figure = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


class Measured:
    """What was measured of a group, by form and schedule.

    Attributes:
        record: as the results file has it.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self._of = {(v["form"], v["schedule"]): v for v in record["variants"]}

    def __contains__(self, variant: tuple[str, str]) -> bool:
        return variant in self._of

    def get(self, variant: tuple[str, str], what: str) -> Any:
        """Return a field of a variant's record; None where it is not there."""
        return self._of.get(variant, {}).get(what)

    def median(self, variant: tuple[str, str]) -> str:
        """Return milliseconds of a call, in words."""
        ms = self.milliseconds(variant)
        return "–" if ms is None else f"{ms:.2f}"

    def milliseconds(self, variant: tuple[str, str]) -> float | None:
        """Return the median of a call; None where it could not run."""
        samples = self.get(variant, "us")
        return float(np.median(samples)) / 1000 if samples else None

    def images_per_s(self, variant: tuple[str, str]) -> float | None:
        """Return how many images a second the median call makes; None where it could not run."""
        ms = self.milliseconds(variant)
        return None if ms is None else 1000 * float(self.record["batch"]) / ms

    def speedup(self, variant: tuple[str, str], over: tuple[str, str] = (NONE, "none")) -> str:
        """Return how many times faster than another, in words."""
        return self._cell(variant, over, lambda own, other: other / own, times)

    def overhead(self, variant: tuple[str, str], over: tuple[str, str]) -> str:
        """Return the share of time beyond another's, in words."""
        return self._cell(variant, over, lambda own, other: own / other - 1, percent)

    def difference(self, variant: tuple[str, str]) -> str:
        """Return how far its outputs are from its twin's, in words."""
        value = self.get(variant, "difference")
        return "–" if value is None else f"{value:.1e}"

    def _cell(
        self, own: tuple[str, str], other: tuple[str, str], figure: Figure,
        words: Callable[[Interval], str],
    ) -> str:  # fmt: skip
        """Write the median of per-round ratios and its interval; "–" where it could not run."""
        samples = [self.get(each, "us") for each in (own, other)]
        if None in samples:
            return "–"
        return words(Interval.of(figure(*(np.array(each, np.float64) for each in samples))))

    @property
    def rounds(self) -> str:
        """Launches × rounds of each."""
        launches = self.record["launches"]
        return f"{launches} × {self.record['rounds'] // launches}"

    @property
    def runtime(self) -> str:
        """The runtime and its precision, in words."""
        record = self.record
        own = ", its own choice" if record["runtime"].endswith("-default") else ""
        device = "" if record["device"] == "CPU" else f" {record['device']}"
        return f"{_ENGINES[record['engine']]}{device} {record['precision']}{own}"


def measured(results: Results, part: str, **fields: Any) -> list[Measured]:
    """Return the groups of a part whose records have these fields."""
    return [
        Measured(record)
        for record in results.groups
        if record["part"] == part
        and "left_out" not in record
        and all(record[name] == value for name, value in fields.items())
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def wrapped(text: str, width: int = 100) -> str:
    """Return a paragraph in lines of at most so many columns."""
    return "\n".join(textwrap.wrap(" ".join(text.split()), width)) + "\n"


def machine(results: Results) -> str:
    """Return a table of the machine and the versions that were measured."""
    known = {name: value for name, value in results.machine.items() if value is not None}
    known |= results.versions
    words = {k: ", ".join(map(str, v)) if isinstance(v, list) else f"{v}" for k, v in known.items()}
    return table(("what", "which"), iter([[name, value] for name, value in words.items()]))


def between(page: str, marks: tuple[str, str], text: str) -> str:
    """Return a page with a text between its marks instead of what was there."""
    begin, end = marks
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"README.md has lost its marks {begin} and {end}")
    return f"{before}{begin}\n{text}{end}{after}"
