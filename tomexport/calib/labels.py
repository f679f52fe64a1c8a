"""Which class an image is of: from class folders, or from a csv."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tomexport.errors import ImageError

_CLASS_COLUMNS = ("class_index", "label", "class", "target", "y")


@dataclass(frozen=True)
class Labels:
    """The class of each image.

    Attributes:
        classes: class indices, in the order of the images; None for an image without.
        note: where they are from, in words.
        n_names: names that classes are numbered by, in sorted order; 0 where numbers are given.
    """

    classes: tuple[int | None, ...]
    note: str
    n_names: int = 0


def class_folders(names: Sequence[str]) -> Labels | None:
    """Take the first folder of each path as its class, in sorted order; None if any has none."""
    tops = [PurePosixPath(name).parts[0] for name in names]
    if any("/" not in name for name in names) or len(set(tops)) < 2:
        return None
    order = sorted(set(tops))
    index = {top: i for i, top in enumerate(order)}
    note = (
        f"labels are the {len(order)} class folders in sorted order: {order[0]} is 0, "
        f"{order[-1]} is {len(order) - 1}"
    )
    return Labels(tuple(index[top] for top in tops), note, len(order))


def from_csv(wanted: str, names: Sequence[str]) -> Labels:
    """Read the classes of images from a csv with a line of headings.

    Args:
        wanted: FILE, or FILE:COLUMN where the heading does not say which column has the classes.
            The column of file names is the one whose entries are names of the images.
        names: paths of the images, within their folder.

    Raises: ImageError if the csv cannot be read, or does not fit the images.
    """
    path, column = _path_and_column(wanted)
    headings, rows = _read(path)
    file_column = _file_column(path, headings, rows, names)
    column = _class_column(path, headings, file_column, column)
    given: dict[str, str] = {}
    for row in rows:
        name, value = row[file_column], row[column].strip()
        if given.setdefault(name, value) != value:
            raise ImageError(
                f"{path} gives {name} two classes, {given[name]!r} and {value!r}; leave one."
            )
    given = {name: value for name, value in given.items() if value}
    index, n_names, how = _indices(path, column, set(given.values()))
    ends = _unique_ends(names)
    classes = tuple(index.get(_entry(given, name, ends)) for name in names)
    n_labelled = sum(c is not None for c in classes)
    if not n_labelled:
        raise ImageError(f"Column {column!r} of {path} has no class for any of the images.")
    some = "" if n_labelled == len(names) else f", for {n_labelled} of {len(names)} images"
    return Labels(classes, f"labels are column {column!r} of {path.name}{how}{some}", n_names)


def _path_and_column(wanted: str) -> tuple[Path, str | None]:
    if not Path(wanted).is_file() and ":" in wanted:
        file, _, column = wanted.rpartition(":")
        return Path(file), column
    return Path(wanted), None


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except (OSError, UnicodeError, csv.Error) as err:
        why = getattr(err, "strerror", None) or err
        raise ImageError(f"The labels {path} cannot be read: {why}.") from err
    if len(lines) < 2:
        raise ImageError(f"{path} has no line of headings with labels below; a csv needs both.")
    headings = [heading.strip() for heading in lines[0]]
    if len(set(headings)) != len(headings):
        raise ImageError(f"{path} has two columns of one heading: {', '.join(headings)}.")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(headings):
            raise ImageError(
                f"Line {number} of {path} has {len(line)} entries, its headings are "
                f"{len(headings)}: {', '.join(headings)}."
            )
    return headings, [dict(zip(headings, line, strict=True)) for line in lines[1:]]


def _file_column(
    path: Path, headings: list[str], rows: list[dict[str, str]], names: Sequence[str]
) -> str:
    known = {*names, *_unique_ends(names)}
    hits = {heading: sum(row[heading] in known for row in rows) for heading in headings}
    best = max(headings, key=lambda heading: hits[heading])
    if not hits[best]:
        raise ImageError(
            f"No column of {path} ({', '.join(headings)}) has names of the images, such as "
            f"{names[0]}."
        )
    return best


def _class_column(path: Path, headings: list[str], file_column: str, wanted: str | None) -> str:
    others = [heading for heading in headings if heading != file_column]
    if wanted is not None and wanted not in others:
        raise ImageError(
            f"{path} has no column {wanted!r} of classes; it has {', '.join(others) or 'none'}."
        )
    known = [name for name in _CLASS_COLUMNS if name in others]
    if wanted is None and not known and len(others) != 1:
        raise ImageError(
            f"Which column of {path} has the classes is not clear from {', '.join(headings)}; say "
            f"it with --labels {path}:COLUMN."
        )
    return wanted or (known or others)[0]


def _indices(path: Path, column: str, values: set[str]) -> tuple[dict[str, int], int, str]:
    """Return the class index of each entry, how many names it is from, and how, in words."""
    numbers = {value for value in values if re.fullmatch(r"\d{1,9}", value)}
    if numbers == values:
        return {value: int(value) for value in values}, 0, ""
    if numbers:
        odd = min(values - numbers)
        raise ImageError(
            f"Column {column!r} of {path} mixes class indices with words, such as {odd!r}; use "
            "one of them."
        )
    order = sorted(values)
    how = f", names in sorted order: {order[0]} is 0, {order[-1]} is {len(order) - 1}"
    return {value: i for i, value in enumerate(order)}, len(order), how


def _unique_ends(names: Sequence[str]) -> set[str]:
    """Return the file names, without folders, that only one of the paths has."""
    counts = Counter(PurePosixPath(name).name for name in names)
    return {end for end, count in counts.items() if count == 1}


def _entry(given: dict[str, str], name: str, ends: set[str]) -> str:
    end = PurePosixPath(name).name
    return given.get(name, given.get(end, "") if end in ends else "")
