"""The results file: raw samples, machine and versions. It appears whole after every group."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomexport
from tomexport.runtime.load import BACKENDS
from tomexport.runtime.machine import machine

ABOUT = (
    "Written by a command in benchmarks/. 'us' of a variant is the median of its calls in "
    "each round, in microseconds, a list for each launch of the processes: figures of a group at "
    "the same place belong to the same round. 'difference' is max |Δ| of the outputs to those of "
    "the variant that must compute the same, relative where they exceed 1. 'peak_mib' is the most "
    "memory that the process held, 'call_mib' the most that its calls held beyond what was loaded."
)
Record = dict[str, Any]


@dataclass
class Results:
    """What has been measured.

    Attributes:
        machine, versions: on what.
        groups: one record each.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    groups: list[Record] = field(default_factory=list)

    @classmethod
    def new(cls, sources: str) -> Results:
        """Return results of this machine, with nothing measured yet.

        Args:
            sources: hash of the code that is measured.
        """
        return cls(
            machine() | {"mhz": None},  # which changes from call to call
            {"tomexport": tomexport.__version__, "sources": sources}
            | {"python": platform.python_version()}
            | {each.name: each.version() for each in BACKENDS}
            | {name: importlib.metadata.version(name) for name in ("torch", "timm", "onnxscript")},
        )

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a results file."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(data["machine"], data["versions"], data["groups"])

    def save(self, path: Path) -> None:
        """Write a results file; lists of samples take a line each."""
        data = {
            "about": ABOUT,
            "machine": self.machine,
            "versions": self.versions,
            "groups": self.groups,
        }
        text = json.dumps(data, indent=1, ensure_ascii=False)
        text = re.sub(r"\[[\d,\s]+\]", lambda found: re.sub(r"\s", "", found[0]), text)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{path.name}.part")
        staged.write_text(text + "\n", encoding="utf-8")
        os.replace(staged, path)

    def measured(self) -> set[tuple[Any, ...]]:
        """Return the keys of the groups, as `Group.key` has them."""
        return {
            (g["part"], g["model"], g["batch"], g["runtime"], tuple(g["schedules"]))
            for g in self.groups
        }
