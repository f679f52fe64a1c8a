"""What was surveyed, in a file, so that it can be done in parts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.pages import ROOT
from benchmarks.support.names import Row
from benchmarks.support.pairs import Pair

SOURCE = ROOT / "benchmarks/results/support.json"


@dataclass
class State:
    """What is known.

    Attributes:
        pairs: by family, then method.
        names: by timm name.
    """

    pairs: dict[str, dict[str, Pair]] = field(default_factory=dict)
    names: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = SOURCE) -> State:
        """Read a file; without one nothing is known."""
        if not path.exists():
            return cls()
        known = json.loads(path.read_text())
        pairs = {
            family: {method: Pair(**each) for method, each in of.items()}
            for family, of in known["pairs"].items()
        }
        return cls(pairs, {name: Row(**each) for name, each in known["names"].items()})

    def save(self, path: Path = SOURCE) -> None:
        """Write the file."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")
