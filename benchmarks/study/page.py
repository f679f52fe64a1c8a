"""What the study found → Markdown."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.pages import README, ROOT, between, table
from tomexport.runtime.profile import times
from tomexport.runtime.timing import Interval

MARKS = "<!-- study:begin -->", "<!-- study:end -->"
RESULTS = ROOT / "benchmarks/results/study.json"
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
CALIBRATED = 100  # images
_PRECISIONS = ("f32", "int8")


_ABOUT = """\
A ViT of 65 tokens and 6 blocks that learned scikit-learn's digits in about a minute:
{accuracy:.1%} top-1 on {n} digits held out. Schedules come in groups that compute equally much;
int8 was calibrated on {c} digits that it was trained on. Top-1 is of the file in its runtime; × is
the speed-up over the unmerged float32 file in the same runtime, batch 1, {threads} CPUs of {cpu},
processes in turns.
"""


def page(study: dict[str, Any]) -> str:
    """Return the study in Markdown."""
    about = _ABOUT.format(
        accuracy=study["accuracy"], n=study["n_held_out"], c=CALIBRATED,
        threads=study["threads"], cpu=study["machine"]["cpu"],
    )  # fmt: skip
    return "\n".join(
        ("", about, _schedules(study), _searched(study), _learned(study["learn"]))
    )  # fmt: skip


def with_tables(readme: str, study: dict[str, Any]) -> str:
    """Return the README with the study between its marks."""
    return between(readme, MARKS, f"{page(study)}\n")


def publish() -> None:
    """Write the results into the README."""
    study = json.loads(RESULTS.read_text(encoding="utf-8"))
    README.write_text(with_tables(README.read_text(encoding="utf-8"), study), encoding="utf-8")


def _schedules(study: dict[str, Any]) -> str:
    of = {(row["schedule"], row["runtime"], row["precision"]): row for row in study["rows"]}
    columns = [(runtime, precision) for runtime in RUNTIMES for precision in _PRECISIONS]

    def cell(schedule: str, column: tuple[str, str]) -> str:
        row = of[(schedule, *column)]
        speed = Interval(row["speedup"], row["speedup_low"], row["speedup_high"])
        same = (schedule, column[1]) == ("none", "f32")
        return f"{100 * row['top1']:.1f}, {'1' if same else times(speed)}"

    rows = [
        [f"`{schedule}`", f"{of[(schedule, *columns[0])]['macs']:.1%}",
         *(cell(schedule, column) for column in columns)]
        for schedule in dict.fromkeys(row["schedule"] for row in study["rows"])
    ]  # fmt: skip
    head = [f"{RUNTIMES[runtime]} {precision}: top-1, speed" for runtime, precision in columns]
    return table(("schedule", "MACs", *head), rows)


def _searched(study: dict[str, Any]) -> str:
    """Say what `search` found, and whether it beats `const` at equal accuracy."""
    found = study["search"]
    points = [point for point in found["points"] if point["on_front"]]
    rows = [
        [f"`{each['schedule']}`", f"{each['gmac']:.4f}", f"{each['latency_ms']:.3f}",
         f"{each['loss']:.1%}", f"{each['held_out_loss']:.1%}"]
        for each in points
    ]  # fmt: skip
    head = ("schedule", "GMACs", "ms", "top-1 lost", "on the other half")
    n = len(found["points"])
    text = f"What `search` found in {found['minutes']:g} minutes (the front of {n} points):"
    return f"{text}\n\n{table(head, rows)}\n{_against_const(found['points'])}\n"


def _against_const(points: list[dict[str, Any]]) -> str:
    """Say which point is faster than a constant schedule that loses no less."""
    consts = [each for each in points if each["schedule"].startswith("const:")]
    pairs = [
        (const["ratio"]["value"] / other["ratio"]["value"], const, other)
        for const in consts
        for other in points
        if other["loss"] <= const["loss"] and other["held_out_loss"] <= const["held_out_loss"]
        and other["schedule"].split(":")[0] not in ("const", "none")
        and other["ratio"]["high"] < const["ratio"]["low"]
    ]  # fmt: skip
    if not pairs:
        return "No point of it is faster than a constant schedule that loses as little."
    # of the fastest constant schedule that is beaten, what beats it by most
    gain, const, other = max(pairs, key=lambda pair: (-pair[1]["ratio"]["value"], pair[0]))
    return (
        f"`{other['schedule']}` is {gain:.2f}× as fast as `{const['schedule']}`, "
        "and loses no more on either half."
    )


def _learned(judgements: list[dict[str, Any]]) -> str:
    def kl(like: dict[str, Any]) -> str:
        return f"{100 * like['top1']['value']:.1f} %, {like['kl']['value']:.4f}"

    rows = [
        [f"`{each['schedule']}`", kl(each["before"]), kl(each["after"]), each["verdict"]]
        for each in judgements
    ]
    head = ("schedule", "ToMe: agreement, KL", "DTEM after `learn`", "verdict")
    text = "Likeness to the unmerged model on digits that `learn` did not see, at equal counts:"
    return f"{text}\n\n{table(head, rows)}"
