"""Which schedule, precision and runtime? A study of a small ViT that learns digits on the spot.

    python -m benchmarks.study              all of it: under 15 minutes on two cores

It does what a user would with a checkpoint and images of his own, and writes what it finds into
study/: study.json, study.md, the files that it measured, the front of a search, and a report to
look at. A model that is trained already is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tomexport
from benchmarks.command import progress
from benchmarks.demo import heading
from benchmarks.study import digits
from benchmarks.study.page import CALIBRATED, RESULTS, RUNTIMES, page, publish
from benchmarks.study.schedules import CONSTANTS, equal
from benchmarks.turns import Timed, speedups
from tomexport.calib.evaluate import evaluate
from tomexport.calib.images import ImageSet
from tomexport.calib.learn.learn import learn
from tomexport.calib.learn.train import Course
from tomexport.calib.quantize import quantize
from tomexport.calib.report.report import report as write_page
from tomexport.runtime.machine import machine, usable_cpus

LEARNED = ("const:13", "const:16")
_LAUNCHES, _ROUNDS, _TURN_S = 2, 10, 0.04
_TRAINED = 12  # epochs of training
_MINUTES = 2.5  # of search
_EPOCHS = 4  # of learn
_MAX_DROP = 0.01
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("study"), help="folder of the files")
    parser.add_argument("--publish", action="store_true", help="put the result into the README")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    study = _study(options.work)
    _page(options.work)
    study["seconds"] = round(time.monotonic() - start)
    (options.work / "study.json").write_text(json.dumps(study, indent=1), encoding="utf-8")
    (options.work / "study.md").write_text(page(study), encoding="utf-8")
    print(page(study))
    if options.publish:
        RESULTS.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
        publish()


def _study(folder: Path) -> dict[str, Any]:
    heading("1. A ViT learns scikit-learn's digits")
    model, accuracy = _trained(folder)
    print(f"top-1 on digits held out: {accuracy:.1%}")
    held_out = ImageSet.find(folder / "held_out.npz", None)
    train = ImageSet.find(folder / "train.npz", None)
    heading("2. Schedules that compute equally much, in float32 and int8")
    wanted = equal(model)
    files = {
        (schedule, *which): path
        for schedule in wanted
        for which, path in _files(model, schedule, train, folder)
    }
    heading("3. How right they are")
    rows = [_judged(wanted, key, path, held_out) for key, path in files.items()]
    heading("4. How fast they are")
    for runtime in RUNTIMES:
        _time(runtime, [row for row in rows if row["runtime"] == runtime], files)
    return {
        "threads": min(2, len(usable_cpus())),
        "machine": machine() | {"mhz": None},
        "accuracy": accuracy,
        "n_held_out": len(held_out),
        "rows": rows,
        "search": _search(model, held_out, folder),
        "learn": _learn(model, train, folder),
    }


def _trained(folder: Path) -> tuple[Path, float]:
    """Write checkpoint and images unless they are there; return where, and how right it is."""
    path, note = folder / "digits.pth", folder / "accuracy.json"
    for name, arrays in digits.images().items():
        np.savez(folder / f"{name}.npz", **arrays)
    if not note.exists():
        model = digits.trained(_TRAINED, print)
        torch.save(model.state_dict(), path)
        note.write_text(json.dumps(digits.accuracy(model)))
    accuracy: float = json.loads(note.read_text())
    return path, accuracy


def _files(
    model: Path, schedule: str, train: ImageSet, folder: Path
) -> Iterator[tuple[tuple[str, str], Path]]:
    """Write a schedule's files; yield each with its runtime and precision."""
    stem = _stem(schedule)
    exported = folder / f"{stem}.onnx"
    print(f"exporting {schedule}", flush=True)
    tomexport.export(model, schedule, exported, force=True)
    for runtime, suffix in (("onnxruntime", ".onnx"), ("openvino", ".xml")):
        yield (runtime, "f32"), exported
        path = folder / f"{stem}.int8{suffix}"
        print(f"  int8 for {RUNTIMES[runtime]}", flush=True)
        quantize(exported, train, path, limit=CALIBRATED, timed=False, force=True)
        yield (runtime, "int8"), path


def _stem(schedule: str) -> str:
    return schedule.replace(":", "").replace(",", "_")


def _judged(
    shares: dict[str, float], key: tuple[str, str, str], path: Path, images: ImageSet
) -> Row:
    schedule, runtime, precision = key
    report = evaluate(path, images, backends=[runtime], precisions=["f32"], batch=None)
    (run,) = report.runs
    assert run.accuracy is not None
    top1 = run.accuracy.top1
    return {
        "schedule": schedule, "macs": shares[schedule], "runtime": runtime, "precision": precision,
        "top1": top1.value, "top1_low": top1.low, "top1_high": top1.high,
    }  # fmt: skip


def _time(runtime: str, rows: list[Row], files: dict[tuple[str, str, str], Path]) -> None:
    """Let all files of a runtime take turns; each row gets its speed-up over `none` in float32."""
    print(f"{RUNTIMES[runtime]}: {_LAUNCHES} launches", flush=True)
    keys = [(row["schedule"], row["precision"]) for row in rows]
    timed = {key: Timed(files[key[0], runtime, key[1]], runtime) for key in keys}
    found = speedups(
        timed, ("none", "f32"), launches=_LAUNCHES, rounds=_ROUNDS, turn_s=_TURN_S
    )  # fmt: skip
    for row, key in zip(rows, keys, strict=True):
        row |= {name: value for name, value in found[key].items() if name != "us"}


def _search(model: Path, images: ImageSet, folder: Path) -> dict[str, Any]:
    heading(f"5. Search, {_MINUTES:g} minutes: the fastest that loses at most {_MAX_DROP:.0%}")
    report = tomexport.search(
        model, images, folder / "found.onnx", max_drop=_MAX_DROP, minutes=_MINUTES,
        storage=str(folder / "search.journal"), force=True, progress=progress,
    )  # fmt: skip
    (folder / "front.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    return report.to_dict() | {"minutes": _MINUTES}


def _learn(model: Path, train: ImageSet, folder: Path) -> list[dict[str, Any]]:
    heading("6. Learn by what to merge")
    path = folder / "learned.safetensors"
    report = learn(
        model, train, path, schedule=LEARNED[0], judge=LEARNED[1:],
        course=Course(epochs=_EPOCHS), force=True, progress=progress,
    )  # fmt: skip
    judgements: list[dict[str, Any]] = report.to_dict()["judgements"]
    return judgements


def _page(folder: Path) -> None:
    heading("7. A page to look at")
    images = ImageSet.find(folder / "held_out.npz", 3)
    found = write_page(
        folder / f"{_stem(CONSTANTS[-1])}.onnx", folder / "report.html", images=images,
        front=folder / "front.json", seconds=2, force=True, progress=progress,
    )  # fmt: skip
    print(f"saved: {found.path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
