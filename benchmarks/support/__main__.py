"""Survey what is supported, and write SUPPORT.md.

    python -m benchmarks.support                       all that is not known of these sources; about
                                                       15 minutes
    python -m benchmarks.support --seconds 170         a part of it; run it again for the next
    python -m benchmarks.support --names 'vit_*dinov3' these names anew, and no methods
    python -m benchmarks.support --page                survey nothing; write the page

What was found lies in benchmarks/results/support.json, each row with a hash of the code that it was
found of.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from benchmarks.latency import files
from benchmarks.support import names, pairs
from benchmarks.support.page import TARGET, page
from benchmarks.support.pairs import Pair
from benchmarks.support.state import State


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.support", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that")
    parser.add_argument("--names", nargs="+", help="patterns of timm names")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    state = _in_order(State.load())
    n_left = 0 if options.page else _survey(state, options.names, options.seconds)
    if n_left:
        sys.exit(f"{n_left} left; run it again")
    TARGET.write_text(page(state))


def _survey(state: State, patterns: Sequence[str] | None, seconds: float) -> int:
    """Survey until the time is over, and return how many are left."""
    sources, end = files.sources("*.py"), time.monotonic() + seconds
    todo = _todo(state, sources, patterns)
    rows = () if patterns else state.names.values()
    known = {row.kind: row.merged for row in rows if row.sources == sources}
    for index, (family, name) in enumerate(todo):
        if time.monotonic() > end:
            return len(todo) - index
        if family is None:
            found = state.names[name] = names.row(name, sources, known)
            print(name, found.none, found.merged, sep=" | ", flush=True)
        else:
            pair = Pair(pairs.verdict(pairs.model_of(family), name), sources)
            state.pairs.setdefault(family, {})[name] = pair
            print(family, name, pair.verdict, sep=" | ", flush=True)
        _in_order(state).save()
    return 0


def _todo(
    state: State, sources: str, patterns: Sequence[str] | None
) -> list[tuple[str | None, str]]:
    """Return the pairs (family, method), and the names as (None, name), that are not known."""
    if patterns:
        return [(None, name) for name in names.names(patterns)]
    every_pair = [(family, method) for family in pairs.families() for method in pairs.methods()]
    of_pairs: list[tuple[str | None, str]] = [
        (family, method)
        for family, method in every_pair
        if (found := state.pairs.get(family, {}).get(method)) is None or found.sources != sources
    ]
    rows = ((name, state.names.get(name)) for name in names.names())
    return of_pairs + [(None, n) for n, row in rows if row is None or row.sources != sources]


def _in_order(state: State) -> State:
    """Return what is there today, in the order of the page."""
    return State(
        {
            family: {m: state.pairs[family][m] for m in pairs.methods() if m in state.pairs[family]}
            for family in pairs.families()
            if family in state.pairs
        },
        {name: state.names[name] for name in names.names() if name in state.names},
    )


if __name__ == "__main__":
    main()
