"""What `make demo` runs: plan, export, proof, and what merging saves and costs here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

MODEL = "deit_tiny_patch16_224"
SCHEDULE = "exp:0.25,0"
FILES = ("demo/deit_tiny.onnx", "demo/deit_tiny.xml")
THREADS = 2
SECONDS = 20  # of timing for each runtime and precision

console = Console(highlight=False)


def main() -> None:
    """Run all steps; the first that fails ends the demo."""
    os.chdir(Path(__file__).parents[1])
    Path("demo").mkdir(exist_ok=True)
    try:
        for step in (plan, export, verify, profile):
            step()
    except KeyboardInterrupt:
        sys.exit(130)


def plan() -> None:
    heading("1. Plan: the tokens and the cost of each block")
    tomexport("plan", MODEL, "--schedule", SCHEDULE)


def export() -> None:
    heading("2. Export: to ONNX, beside it unmerged and with free merging, and to OpenVINO IR")
    print(
        "The weights are random (seeded), so that nothing is downloaded: what the model predicts\n"
        "means nothing here. Its speed does, and that the files compute what PyTorch computes."
    )
    seeded = (MODEL, "--random-weights", "0", "--schedule", SCHEDULE, "--force", "-o")
    tomexport(*seeded, FILES[0], "--with-baselines")
    tomexport(*seeded, FILES[1])


def verify() -> None:
    heading("3. Verify: the files alone, as on a board without PyTorch")
    for file in FILES:
        tomexport("verify", file)


def profile() -> None:
    heading("4. Profile: what merging saves, and what it costs")
    threads = min(THREADS, os.cpu_count() or 1)
    tomexport("profile", FILES[0], "--threads", f"{threads}", "--seconds", f"{SECONDS}")


def heading(text: str) -> None:
    console.print()
    console.rule(text, align="left")


def tomexport(*arguments: str) -> None:
    """Show a command as a user would type it, and run it."""
    print(f"\n$ tomexport {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "tomexport", *arguments]).returncode
    if code:
        sys.exit(f"demo: this command failed with exit code {code}")


if __name__ == "__main__":
    main()
