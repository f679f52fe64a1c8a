"""What `make demo` runs: export merged and unmerged, prove the files, compare their speed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from latency import Result, Variant, compare
from rich.console import Console
from rich.table import Table

from tomexport.errors import TomexportError

MODEL = "deit_tiny_patch16_224"
SCHEDULES = {"exp": "exp:0.25,0", "none": "none"}
FILES = {
    f"demo/deit_tiny_{name}{suffix}": schedule
    for name, schedule in SCHEDULES.items()
    for suffix in (".onnx", ".xml")
}
RUNS = (  # runtime, precision, suffix of the files; None is the runtime's own choice
    ("onnxruntime", "f32", ".onnx"),
    ("openvino", "f32", ".xml"),
    ("openvino", None, ".xml"),
)
THREADS = 2
SECONDS = 20  # of timing for each run

console = Console(highlight=False)


def main() -> None:
    """Run all steps; the first that fails ends the demo."""
    os.chdir(Path(__file__).parents[1])
    Path("demo").mkdir(exist_ok=True)
    try:
        for step in (plan, export, verify, speed):
            step()
    except TomexportError as err:
        sys.exit(f"demo: {err}")
    except KeyboardInterrupt:
        sys.exit(130)


def plan() -> None:
    heading("1. Plan: the tokens and the cost of each block")
    tomexport("plan", MODEL, "--schedule", SCHEDULES["exp"])


def export() -> None:
    heading("2. Export: merged and unmerged, to ONNX and to OpenVINO IR")
    print(
        "The weights are random (seeded), so that nothing is downloaded: what the model predicts\n"
        "means nothing here. Its speed does, and that the files compute what PyTorch computes."
    )
    for file, schedule in FILES.items():
        seeded = ("--random-weights", "0")
        tomexport(MODEL, *seeded, "--schedule", schedule, "-o", file, "--force")


def verify() -> None:
    heading("3. Verify: the files alone, as on a board without PyTorch")
    for file in FILES:
        tomexport("verify", file)


def speed() -> None:
    heading("4. Speed: merged against unmerged, taking turns")
    results = []
    for backend, precision, suffix in RUNS:
        console.print(f"timing {backend}, {precision or 'its own precision'}, {SECONDS} s …")
        files = [f"demo/deit_tiny_{name}{suffix}" for name in ("none", "exp")]
        variants = [Variant(file, backend, precision) for file in files]
        results.append(compare(variants, seconds=SECONDS, threads=THREADS))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("runtime", no_wrap=True)
    for name in ("unmerged ms", "merged ms", "speed-up", "95 %", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    for unmerged, merged in results:
        table.add_row(
            label(merged),
            *(f"{result.summary()['median_ms']:.2f}" for result in (unmerged, merged)),
            f"{merged.speedup:.2f}×",
            f"{merged.speedup_low:.2f}–{merged.speedup_high:.2f}",
            f"{merged.speedup_by_macs:.2f}×",
        )
    print(f"\n{MODEL}, {SCHEDULES['exp']}, batch 1, {THREADS} threads", flush=True)
    console.print(table)
    print(
        "Times are medians of all calls. The speed-up is the median over rounds in which both\n"
        "files had a turn, with its 95 % interval. Predicted is the ratio of MACs: it leaves out\n"
        "the merging itself, softmax, norms and memory traffic.\n"
    )
    for _, merged in results:
        print(f"{label(merged)}: {verdict(merged)}")


def heading(text: str) -> None:
    console.print()
    console.rule(text, align="left")


def tomexport(*arguments: str) -> None:
    """Show a command as a user would type it, and run it."""
    print(f"\n$ tomexport {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "tomexport", *arguments]).returncode
    if code:
        sys.exit(f"demo: this command failed with exit code {code}")


def label(result: Result) -> str:
    return f"{result.backend} {result.precision}"


def verdict(merged: Result) -> str:
    """Say in one sentence what the interval allows to say."""
    predicted = merged.speedup_by_macs or 1.0
    if merged.speedup_high < 1:
        return f"merging does not pay here: slower, where {predicted:.2f}× was predicted."
    if merged.speedup_low <= 1:
        return f"no difference that stands out from the noise; {predicted:.2f}× was predicted."
    if merged.speedup_high < predicted:
        return f"merging pays, but less than the {predicted:.2f}× predicted."
    if merged.speedup_low > predicted:
        return f"merging pays, and more than the {predicted:.2f}× predicted."
    return f"merging pays, within the noise as much as the {predicted:.2f}× predicted."


if __name__ == "__main__":
    main()
