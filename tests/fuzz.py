"""Mutate a file and run a command on it, many times over: `python tests/fuzz.py JOBS.json`.

In a process of its own, because what a damaged file does to a native library may end the process.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import time
from pathlib import Path

_INTERESTING = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x2C, 0x7B)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Damage data in one of the ways in which files are damaged."""
    changed = bytearray(data)
    place, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    match draw.randrange(7):
        case 0:  # cut short
            del changed[place:]
        case 1:  # a hole
            del changed[place : min(end, place + 4096)]
        case 2:  # a piece twice
            changed[place:place] = changed[place : min(end, place + 4096)]
        case 3:  # zeros, as a disk leaves them
            changed[place:end] = bytes(end - place)
        case 4:  # noise in a piece
            piece = min(end - place, 64)
            changed[place : place + piece] = draw.randbytes(piece)
        case 5:  # a few bytes, anywhere
            for _ in range(draw.randint(1, 16)):
                changed[draw.randrange(len(changed))] = draw.choice(_INTERESTING)
        case 6:  # a few bytes at the front, where formats say what they are
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(min(256, len(changed)))] = draw.randrange(256)
    return bytes(changed)


def run(job: dict[str, object]) -> None:
    """Run a job: {"source", "name", "words", "count", "seed", "folder"}; print a line for each.

    `words` are the command's; {file} stands for the mutated file, {folder} for the one that it is
    in, which holds a copy of the source's neighbours, {out} for where outputs can go.
    """
    from tomexport.cli import main

    source = Path(str(job["source"]))
    folder = Path(str(job["folder"]))
    draw = random.Random(int(str(job["seed"])))
    original = source.read_bytes()
    for index in range(int(str(job["count"]))):
        place, out = folder / "in", folder / "out"
        for each in (place, out):
            shutil.rmtree(each, ignore_errors=True)
        shutil.copytree(source.parent, place)
        out.mkdir()
        file = place / source.name
        file.write_bytes(mutated(original, draw))
        words = [
            word.format(file=file, folder=place, out=out)
            for word in job["words"]  # type: ignore[attr-defined]
        ]
        _say({"source": source.name, "index": index})
        stdout, stderr = io.StringIO(), io.StringIO()
        start = time.monotonic()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                code: object = main(words)
            except BaseException as err:  # noqa: BLE001  that is what is looked for
                code = repr(err)
        report = {
            "index": index, "code": code, "err": stderr.getvalue()[-2000:],
            "seconds": round(time.monotonic() - start, 1),
            "left": sorted(each.name for each in out.iterdir()),
            "source": source.name, "writes": [Path(w).name for w in words if Path(w).parent == out],
        }  # fmt: skip
        _say(report)


def _say(what: dict[str, object]) -> None:
    sys.stdout.write(f"{json.dumps(what)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
