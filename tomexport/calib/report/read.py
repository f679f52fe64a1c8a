"""What other commands wrote with --json, read back into the values that it was made of."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from tomexport.errors import ArtifactError

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """One way to run a model, as `search` measured it.

    Attributes:
        method, schedule, precision: what it is.
        gmac: multiply-accumulates of an image, in 10⁹.
        latency_ms: of a call.
        loss: what it loses, as `Front.loss` says.
        held_out_loss: the same on images that no choice was made by; None where there are none.
        on_front: whether no other point is better in both.
        chosen: whether it is the one that was exported.
    """

    method: str
    schedule: str
    precision: str
    gmac: float
    latency_ms: float
    loss: float
    on_front: bool
    held_out_loss: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Unmerged:
    """The original model: the time of a call."""

    latency_ms: float


@dataclass(frozen=True)
class Front:
    """What `search` found.

    Attributes:
        model: what was searched.
        points: all that was measured.
        loss: what the loss is, in words.
        unmerged: the original model; None if it was not timed.
    """

    model: str
    points: tuple[Point, ...]
    loss: str
    unmerged: Unmerged | None = None


def read(path: Path, kind: type[T], command: str) -> T:
    """Read a value from JSON.

    Args:
        path: the file.
        kind: a dataclass, whose fields the file has; what else it has is left aside.
        command: what writes such files, in words.

    Raises: ArtifactError if the file cannot be read, or has something else in it.
    """
    try:
        found: T = rebuild(kind, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, OverflowError, RecursionError, ArtifactError) as err:
        why = getattr(err, "strerror", None) or (f"no {err}" if isinstance(err, KeyError) else err)
        raise ArtifactError(
            f"{path} is not what {command} writes ({why}). Write it anew: {command} > {path.name}"
        ) from err
    return found


def rebuild(kind: Any, value: Any) -> Any:
    """Make a value of a type from plain JSON data, and check all of it on the way.

    Raises: ArtifactError, KeyError or OverflowError for data of another kind.
    """
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        types_of = get_type_hints(kind)
        needed = (f for f in dataclasses.fields(kind) if f.name in _of(dict, value) or not _has(f))
        return kind(**{f.name: rebuild(types_of[f.name], value[f.name]) for f in needed})
    if origin in (Union, types.UnionType):
        (other,) = set(arguments) - {type(None)}
        return None if value is None else rebuild(other, value)
    if origin in (tuple, list):
        n = len(_of(list, value))
        of = [arguments[0]] * n if arguments[-1] is ... or origin is list else arguments
        return origin(rebuild(*each) for each in zip(of, value, strict=True))
    if origin is dict:
        return {key: rebuild(arguments[1], each) for key, each in _of(dict, value).items()}
    if kind is float:
        return _finite(float(value) if type(value) is int else _of(float, value))
    return _of(kind, value)


def _has(field: dataclasses.Field[Any]) -> bool:
    """Tell whether a field has a default."""
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ArtifactError(f"{value} where a finite number belongs")
    return value


def _of(kind: type[T], value: Any) -> T:
    if type(value) is not kind:  # True is no number here
        raise ArtifactError(f"{value!r:.40} where a {kind.__name__} belongs")
    return value
