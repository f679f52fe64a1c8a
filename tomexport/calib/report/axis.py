"""Axes of charts: which values get a mark, and where a value lies, in per cent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A straight axis between two round values.

    Attributes:
        low, high: its ends.
        step: between marks.
    """

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: Iterable[float], *, zero: bool = True, marks: int = 5) -> Axis:
        """Make an axis that holds all values.

        Args:
            values: finite; at least one.
            zero: begin, or end, at zero.
            marks: about how many marks there are to be.
        """
        all_values = [*values, *([0.0] if zero else [])]
        low, high = min(all_values), max(all_values)
        if high == low:
            low, high = low - 0.5 * (not zero), high + (1.0 if zero else 0.5)
        raw = (high - low) / marks
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
        start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(start * step, end * step, step)

    def at(self, value: float) -> float:
        """Return where a value lies between the ends, in per cent."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    @property
    def marks(self) -> Iterator[tuple[float, str]]:
        """Where each mark lies, in per cent, and what it says."""
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        digits += not math.isclose(self.step * 10**digits, round(self.step * 10**digits))
        for i in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + i * self.step
            yield self.at(value), f"{value + 0:.{digits}f}"
