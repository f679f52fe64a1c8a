"""What was found of a trained model → Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.pages import ROOT, table, wrapped
from tomexport.runtime.profile import percent, times
from tomexport.runtime.timing import Interval

RESULTS = ROOT / "benchmarks/results/trained.json"
PAGE = ROOT / "benchmarks/results/TRAINED.md"
BUDGETS = (0.925, 0.735)  # GMACs: those of const:8 and const:13
Row = dict[str, Any]

_ABOUT = """\
A ViT-Tiny/16 that was trained on photographs (200 classes), by `python -m benchmarks.trained`.
*Agreement* is the share of images with the unmerged model's first class, in brackets its 95 %
interval. *Images* are 500 photographs of ImageNet, by which lists were chosen; *others* are 500 of
CIFAR-10, by which nothing was. MACs are those of the plan, which counts the last block whole.
Speeds are of files that take turns on two CPUs at batch 1, over the unmerged float32 file in the
same runtime.
"""


def page(found: dict[str, Any]) -> str:
    """Return the parts that were measured, in Markdown."""
    parts = [_PARTS[name](found[name]["rows"]) + _where(found[name])
             for name in _PARTS if name in found]  # fmt: skip
    return "\n".join(("# A trained model\n", wrapped(_ABOUT), *parts))


def _where(part: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    return "\n" + wrapped(f"{part['machine']['cpu']}; {versions}.")


def _share(found: Row, sign: str = "") -> str:
    low, high = (f"{100 * found[end]:{sign}.1f}" for end in ("low", "high"))
    return f"{100 * found['value']:{sign}.1f} % ({low}–{high})"


def _speed(found: Row) -> str:
    return times(Interval(found["speedup"], found["speedup_low"], found["speedup_high"]))


def _lists(rows: list[Row]) -> str:
    cells = [
        [f"{row['budget']}", f"`{row['method']}`", f"`{row['schedule']}`", f"{row['gmac']:.3f}",
         f"{1 - row['loss']:.1%}", f"{1 - row['held_out_loss']:.1%}"]
        for row in rows
    ]  # fmt: skip
    head = ("GMACs, at most", "method", "list", "GMACs", "agreement, images", "others")
    return "## What `search` found\n\n" + table(head, cells)


def _nearby(rows: list[Row]) -> str:
    cells = []
    for budget in BUDGETS:
        best, *drawn = [row for row in rows if row["budget"] == budget]
        cells.append([
            f"{budget}", f"{len(drawn)}",
            *(each for name in ("images", "others")
              for each in (_spread(drawn, name), f"{100 * best[name]['value']:.1f} %")),
            f"{_correlation(drawn):+.2f}",
        ])  # fmt: skip
    head = ("GMACs, at most", "lists", "agreement, images: lowest, median, highest", "the best's",
            "others: lowest, median, highest", "the best's", "correlation")  # fmt: skip
    text = wrapped(
        "Lists drawn around the best one of each budget (each count times a random factor, then "
        "all scaled to the MACs). One share has a standard error of 1.4 to 2.0 %: where lists "
        "differ by no more, and what agrees on images does not on others, images of this number "
        "cannot tell a better list."
    )
    return f"## Around the best lists\n\n{text}\n" + table(head, cells)


def _spread(rows: list[Row], name: str) -> str:
    shares = sorted(100 * row[name]["value"] for row in rows)
    return f"{shares[0]:.1f}, {statistics.median(shares):.1f}, {shares[-1]:.1f} %"


def _correlation(rows: list[Row]) -> float:
    return statistics.correlation(
        *([row[name]["value"] for row in rows] for name in ("images", "others"))
    )


def _schedules(rows: list[Row]) -> str:
    cells = [
        [f"`{row['schedule']}`", f"`{row['method']}`", f"{row['gmac']:.3f}", _share(row["images"]),
         _share(row["others"]), _speed(row["onnxruntime"]), _speed(row["openvino"])]
        for row in rows
    ]  # fmt: skip
    head = ("schedule", "method", "GMACs", "agreement, images", "others", "ONNX Runtime f32",
            "OpenVINO f32")  # fmt: skip
    return "## Schedules\n\n" + table(head, cells)


def _int8(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        schedules = list(row["kept"])
        for schedule in schedules:
            rest = _share(row["merged_above_unmerged"], "+") if schedule != "none" else "–"
            cells.append([
                row["runtime"], f"`{schedule}`", _share(row["kept"][schedule]), rest,
                _speed(row["speed"][f"{schedule} f32"]), _speed(row["speed"][f"{schedule} int8"]),
            ])  # fmt: skip
    head = ("runtime", "schedule", "int8 keeps the first class of its float32 self",
            "above unmerged, paired", "float32", "int8, the rest float32")  # fmt: skip
    text = "Calibrated on 250 of the images, judged on the 250 others of them."
    return f"## int8\n\n{text}\n\n" + table(head, cells)


def _learned(rows: list[Row]) -> str:
    cells = [
        [f"`{row['schedule']}`", f"{row['dtem_gmac']:.3f}",
         _share(row["judgement"]["before"]["top1"]), _share(row["judgement"]["after"]["top1"]),
         _share(row["tome"]), _share(row["dtem"])]
        for row in rows
    ]  # fmt: skip
    first = rows[0]
    text = wrapped(
        f"DTEM's embedding, {first['steps']} steps on {first['n_learned']} images, half of both "
        f"kinds less a quarter held out; agreement on those {first['judgement']['kl']['n']} held "
        f"out, in PyTorch, and on the {first['dtem']['n']} of the other halves, of the files. "
        "The lists are of an earlier search on the images."
    )
    head = ("list", "GMACs", "ToMe, held out", "learned, held out", "ToMe, the rest",
            "learned, the rest")  # fmt: skip
    return f"## Learned merging\n\n{text}\n" + table(head, cells)


def _deit(rows: list[Row]) -> str:
    cells = [
        [f"`{row['schedule']}`", f"{row['speed']['timm f32']['ms']:.2f}",
         f"{row['speed']['int8']['ms']:.2f}", _speed(row["speed"]["int8"]),
         _speed(row["speed"]["int8 none"]), percent(Interval(**row["overhead"]))]
        for row in rows
    ]  # fmt: skip
    head = ("schedule", "timm's f32 in ONNX Runtime, ms", "int8 in OpenVINO, ms", "speed-up",
            "int8 unmerged", "over its int8 bound")  # fmt: skip
    text = "`deit_tiny_patch16_224`, seeded weights, 4 × 25 rounds, all in one run."
    return f"## DeiT-Tiny in int8\n\n{text}\n\n" + table(head, cells)


_PARTS: dict[str, Callable[[list[Row]], str]] = {
    "lists": _lists, "nearby": _nearby, "schedules": _schedules, "int8": _int8,
    "learned": _learned, "deit": _deit,
}  # fmt: skip
