"""What merging, int8, search and learning do to a model that is really trained.

    python -m benchmarks.trained MODEL --images DIR --others FILE.npz          all parts
    python -m benchmarks.trained MODEL --images DIR --others FILE.npz int8     one of them

MODEL is a checkpoint, DIR has images without labels that lists are searched on and that int8 is
calibrated on, --others has some that are judged on alone. Neither is part of the project. Each part
is written into benchmarks/results/trained.json when it is done; TRAINED.md shows them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tomexport
from benchmarks.command import progress
from benchmarks.demo import heading
from benchmarks.latency import peers
from benchmarks.latency.files import sources
from benchmarks.latency.results import Results
from benchmarks.trained.page import BUDGETS, PAGE, RESULTS, page
from benchmarks.turns import Timed, speedups
from tomexport.artifact import Array
from tomexport.calib.evaluate import evaluate
from tomexport.calib.fidelity import difference, hits, share
from tomexport.calib.images import ImageSet
from tomexport.calib.learn.learn import learn
from tomexport.calib.learn.train import Course
from tomexport.calib.outputs import compute, file_engine
from tomexport.calib.quantize import quantize
from tomexport.calib.search.lists import Arithmetic, as_schedule
from tomexport.calib.search.measure import halves
from tomexport.exporter.families import family_of
from tomexport.exporter.source import find
from tomexport.pipeline import describe
from tomexport.plan import TWO_SET, Schedule
from tomexport.runtime.timing import Interval

METHODS = ("tome:metric=x-after", "tome")
PLAIN = ("none", "const:8", "exp:0.25,0", "const:13")
MERGED = "exp:0.25,0"  # what is compared in int8
LEARNED = (  # of an earlier search
    "list:0,0,0,0,20,19,19,19,19,19,19,19",
    "list:0,0,18,20,20,20,20,20,20,20,16,12",
)
_EVALUATIONS = 90  # lists for each method and budget
_NEARBY = 12  # lists drawn around each best one
_SPREAD = 0.25  # of the logarithm of their counts
_EPOCHS = 10
_TURNS = {"launches": 3, "rounds": 15, "turn_s": 0.1}
_RUNTIMES = {"onnxruntime": ".onnx", "openvino": ".xml"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What all parts use: checkpoint, images to choose by and others, and a folder for files."""

    model: Path
    images: ImageSet
    others: ImageSet
    work: Path

    def export(self, schedule: str, method: str | None = None, model: Path | None = None) -> Path:
        """Export a schedule into the folder, with its proof; return the file."""
        name = f"{method or ''}-{schedule}".strip("-").translate(str.maketrans(":,=", "___"))
        path = self.work / f"{name}.onnx"
        print(f"exporting {schedule}", flush=True)
        tomexport.export(model or self.model, schedule, path, method=method, force=True)
        return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trained", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--others", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/trained"))
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    images, others = (
        ImageSet.find(each, None, labels="none") for each in (options.images, options.others)
    )
    material = Material(options.model, images, others, options.work)
    for name in options.parts or PARTS:
        heading(name)
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        rows = PARTS[name](material)
        here = Results.new(sources("*.py", "*.h", "*.cpp"))
        found[name] = {"machine": here.machine, "versions": here.versions, "rows": rows}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(found), encoding="utf-8")
        print(page({name: found[name]}), flush=True)


def lists(given: Material) -> list[Row]:
    """Search a list for each budget of MACs, by each method; the storages are kept."""
    rows = []
    for budget in BUDGETS:
        report = tomexport.search(
            given.model, given.images, given.work / f"list-{budget}.onnx", held_out=given.others,
            max_gmac=budget, methods=METHODS, families=("list",), trials=len(METHODS),
            evaluations=_EVALUATIONS, seconds=2.0, force=True, progress=progress,
            storage=str(given.work / f"search-{budget}.journal"),
        )  # fmt: skip
        rows += [point.to_dict() | {"budget": budget} for point in report.points]
    return rows


def schedules(given: Material) -> list[Row]:
    """Judge and time plain schedules, and the lists that were found."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["lists"]["rows"]
    wanted = [(None, schedule) for schedule in PLAIN]
    wanted += [(row["method"], row["schedule"]) for row in _best(found)]
    files = {each: given.export(each[1], each[0]) for each in wanted}
    rows = [
        {"method": method or "tome", "schedule": schedule, **_judged(given, path, files[wanted[0]])}
        for (method, schedule), path in files.items()
    ]
    for runtime in _RUNTIMES:
        print(f"timing in {runtime}", flush=True)
        timed = {key: Timed(path, runtime) for key, path in files.items()}
        speeds = speedups(timed, wanted[0], **_TURNS)
        for row, key in zip(rows, files, strict=True):
            row[runtime] = speeds[key]
    return rows


def _best(found: list[Row]) -> list[Row]:
    """Return the best list of each budget."""
    return [
        min((row for row in found if row["budget"] == budget),
            key=lambda row: (row["loss"], row["divergence"]))
        for budget in BUDGETS
    ]  # fmt: skip


def nearby(given: Material) -> list[Row]:
    """Judge lists drawn around the best ones, of as many MACs: does any stand out?"""
    found, rng = find(given.model), np.random.default_rng(0)
    metadata = describe(given.export("none"))
    both = {"images": given.images, "others": given.others}
    pixels = {
        name: [torch.from_numpy(batch.pixels) for batch in images.batches(metadata)]
        for name, images in both.items()
    }
    first = {name: _classes(tomexport.reduce(found, "none"), seen) for name, seen in pixels.items()}
    rules = Arithmetic(family_of(found.model).cost(found.model, found.name), TWO_SET)
    rows = []
    for best in _best(json.loads(RESULTS.read_text(encoding="utf-8"))["lists"]["rows"]):
        counts, budget = np.array(Schedule.parse(best["schedule"]).values), best["budget"] * 1e9
        factors = np.exp(rng.normal(0, _SPREAD, (_NEARBY, len(counts))))
        drawn = [
            as_schedule(rules.fit(shape, int(budget))) for shape in (counts * factors).tolist()
        ]
        for schedule in (best["schedule"], *drawn):
            model = tomexport.reduce(found, schedule, method=best["method"])
            row = {"budget": best["budget"], "method": best["method"], "schedule": schedule,
                   "gmac": round(rules.plan(schedule).macs / 1e9, 4)}  # fmt: skip
            for name, seen in pixels.items():
                row[name] = asdict(share(_classes(model, seen) == first[name]))
            print(schedule, *(f"{row[name]['value']:.3f}" for name in pixels), flush=True)
            rows.append(row)
    return rows


def _classes(model: nn.Module, pixels: list[Tensor]) -> Array:
    with torch.inference_mode():
        return np.concatenate([model(batch).argmax(dim=1).numpy() for batch in pixels])


def _judged(given: Material, path: Path, unmerged: Path) -> Row:
    row: Row = {"gmac": round(describe(path).plan.macs / 1e9, 4)}
    for name, images in (("images", given.images), ("others", given.others)):
        report = evaluate(
            path, images, backends=["onnxruntime"], precisions=["f32"], baseline=unmerged
        )
        likeness = report.runs[0].likeness
        assert likeness is not None
        assert likeness.top1 is not None
        row[name] = asdict(likeness.top1)
    return row


def int8(given: Material) -> list[Row]:
    """Compare int8, merged and unmerged, with their own float32 selves, on the same images."""
    calibrated, judged = halves(given.images)
    rows = []
    for runtime, suffix in _RUNTIMES.items():
        kept, files = {}, {}
        for schedule in ("none", MERGED):
            path = given.export(schedule)
            made = path.with_suffix(f".int8{suffix}")
            print(f"int8 for {runtime}", flush=True)
            quantize(path, calibrated, made, limit=len(calibrated), timed=False, force=True)
            before, after = (
                compute(file_engine(file, runtime, precision="f32"), judged, describe(path)).values
                for file in (path, made)
            )
            kept[schedule] = hits(after, before.argmax(axis=1))
            files |= {(schedule, "f32"): Timed(path, runtime),
                      (schedule, "int8"): Timed(made, runtime)}  # fmt: skip
        speeds = speedups(files, ("none", "f32"), **_TURNS)
        rows.append({
            "runtime": runtime,
            "kept": {schedule: asdict(share(found)) for schedule, found in kept.items()},
            "merged_above_unmerged": asdict(difference(kept[MERGED], kept["none"])),
            "speed": {" ".join(key): speed for key, speed in speeds.items()},
        })  # fmt: skip
    return rows


def learned(given: Material) -> list[Row]:
    """Learn at a list of each budget, on half of all images; judge on the rest, as exported."""
    learners, rest = (_folder(given, name, which) for which, name in enumerate(("learn", "judge")))
    rows = []
    for budget, schedule in zip(BUDGETS, LEARNED, strict=True):
        path = given.work / f"learned-{budget}.safetensors"
        report = learn(
            given.model, ImageSet.find(learners, None), path, schedule=schedule,
            course=Course(epochs=_EPOCHS), force=True, progress=progress,
        )  # fmt: skip
        judgement = report.to_dict()["judgements"][0]
        row = {"budget": budget, "schedule": schedule, "judgement": judgement,
               "n_learned": report.n_learned, "steps": report.learned.steps}  # fmt: skip
        for method, model in (("tome", given.model), ("dtem", path)):
            unmerged = given.export("none", method, model)  # of the same weights, learned or not
            file = given.export(schedule, method, model)
            run = evaluate(file, ImageSet.find(rest, None), backends=["onnxruntime"],
                           precisions=["f32"], baseline=unmerged).runs[0]  # fmt: skip
            assert run.likeness is not None
            assert run.likeness.top1 is not None
            row[method] = asdict(run.likeness.top1)
            row[f"{method}_gmac"] = round(describe(file).plan.macs / 1e9, 4)
        rows.append(row)
    return rows


def _folder(given: Material, name: str, which: int) -> Path:
    """Write one half of the images, and of the others, into a folder of one kind."""
    folder = given.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for prefix, images in (("images", given.images), ("others", given.others)):
        half = halves(images)[which]
        for i, original in enumerate(half.names):
            half.open(i).save(folder / f"{prefix}-{Path(original).stem}.png")
    return folder


def deit(given: Material) -> list[Row]:
    """Time DeiT-Tiny's int8 file beside timm's own float32 export, and beside its own bound."""
    name, runtime = "deit_tiny_patch16_224", "openvino"
    path, own = given.work / "deit.onnx", given.work / "timm.onnx"
    tomexport.export(name, MERGED, path, random_weights=0, with_baselines=True, force=True)
    seeded = find(name, random_weights=0).model.eval()
    peers.to_onnx(seeded, torch.zeros(1, 3, 224, 224), own)
    made = path.with_suffix(".int8.xml")
    quantize(path, given.images, made, with_baselines=True, timed=False, force=True)
    files = {
        "timm f32": Timed(own, "onnxruntime"),
        "int8": Timed(made, runtime, None),
        "int8 bound": Timed(made.with_name("deit.int8.bound.xml"), runtime, None),
        "int8 none": Timed(made.with_name("deit.int8.none.xml"), runtime, None),
    }
    speeds = speedups(files, "timm f32", launches=4, rounds=25, turn_s=0.1)
    us = {key: np.array(each["us"]) for key, each in speeds.items()}
    overhead = Interval.of(us["int8"] / us["int8 bound"] - 1)
    return [{"schedule": MERGED, "speed": speeds, "overhead": asdict(overhead)}]


PARTS: dict[str, Callable[[Material], list[Row]]] = {
    "lists": lists, "nearby": nearby, "schedules": schedules, "int8": int8, "learned": learned,
    "deit": deit,
}  # fmt: skip


if __name__ == "__main__":
    main()
