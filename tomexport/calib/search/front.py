"""What was measured of each point, which of them nothing beats, and which is taken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tomexport.calib.search.space import Point
from tomexport.errors import ArtifactError
from tomexport.runtime.timing import Interval


@dataclass(frozen=True)
class Measured:
    """A point as it was measured.

    Attributes:
        method, schedule, precision, removed, gmac: see `Point`.
        ratio: its time over the unmerged model's in float32, the interval over rounds.
        loss: what it loses on the images searched on: top-1 accuracy, as a share; without labels
            the share of images with another first class than the unmerged model gives.
        divergence: mean divergence from the unmerged outputs on these, in nats.
        held_out_loss, held_out_divergence: the same on images that no choice was made by.
    """

    method: str
    schedule: str
    precision: str
    removed: tuple[int, ...]
    gmac: float
    ratio: Interval
    loss: float
    divergence: float
    held_out_loss: float
    held_out_divergence: float

    @property
    def point(self) -> Point:
        """What was measured."""
        return Point(self.method, self.schedule, self.precision, self.removed, self.gmac)

    @property
    def worst_loss(self) -> float:
        """The larger of both losses."""
        return max(self.loss, self.held_out_loss)

    def beats(self, other: Measured) -> bool:
        """Whether it is no worse in time and loss, and better in one; divergence breaks ties."""
        own, theirs = (self.loss, self.divergence), (other.loss, other.divergence)
        no_worse = self.ratio.value <= other.ratio.value and own <= theirs
        return no_worse and (self.ratio.value, own) != (other.ratio.value, theirs)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """Read what `to_dict` gave.

        Raises: ArtifactError if something is missing or of another kind.
        """
        try:
            own = {field.name: data[field.name] for field in fields(cls)}
            own["removed"] = tuple(int(count) for count in own["removed"])
            own["ratio"] = Interval(**{k: float(v) for k, v in own["ratio"].items()})
            for name in ("gmac", "loss", "divergence", "held_out_loss", "held_out_divergence"):
                own[name] = float(own[name])
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise ArtifactError(
                f"A trial in the storage is damaged ({type(err).__name__} {err}). Name another "
                "storage; nothing in this one was changed."
            ) from err
        return cls(**own)


@dataclass(frozen=True)
class Limits:
    """What the file may cost.

    Attributes:
        latency_ms: the most that a call may take.
        drop: the most that it may lose, as `Measured.loss` says.
        gmac: the most multiply-accumulates of an image, in 10⁹.
    """

    latency_ms: float | None = None
    drop: float | None = None
    gmac: float | None = None

    def excess(self, point: Measured, unmerged_ms: float) -> dict[str, float]:
        """Return how far a point is beyond each limit; 0 or less is within."""
        excess = {}
        if self.latency_ms is not None:
            excess["latency"] = point.ratio.value * unmerged_ms / self.latency_ms - 1
        if self.drop is not None:
            excess["drop"] = point.loss - self.drop
        return excess

    def keeps(self, point: Measured, unmerged_ms: float) -> bool:
        """Whether a point is within all limits, on the held-out images too."""
        return (
            (self.latency_ms is None or point.ratio.value * unmerged_ms <= self.latency_ms)
            and (self.drop is None or point.worst_loss <= self.drop)
            and (self.gmac is None or point.gmac <= self.gmac)
        )

    @property
    def rule(self) -> str:
        """Which point is taken, in words."""
        limits = [
            *([f"at most {self.latency_ms:g} ms"] if self.latency_ms is not None else []),
            *([f"a loss of at most {self.drop:.2%} on both halves of the images"]
              if self.drop is not None else []),
            *([f"at most {self.gmac:g} GMACs"] if self.gmac is not None else []),
        ]  # fmt: skip
        what = "the fastest" if self.drop is not None else "the one that loses least"
        return f"{what} with {' and '.join(limits)}"

    def choose(self, points: Sequence[Measured], unmerged_ms: float) -> Measured | None:
        """Return the fastest within the limits; without a limit of loss, what loses least."""
        within = [point for point in points if self.keeps(point, unmerged_ms)]
        if self.drop is not None:
            return min(within, key=lambda p: (p.ratio.value, p.loss, p.divergence), default=None)
        return min(within, key=lambda p: (p.loss, p.divergence, p.ratio.value), default=None)


def on_front(points: Sequence[Measured]) -> list[bool]:
    """Tell of each point whether no other beats it."""
    return [not any(other.beats(point) for other in points) for point in points]
