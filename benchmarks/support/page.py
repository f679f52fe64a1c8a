"""SUPPORT.md, from what was surveyed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.pages import ROOT
from benchmarks.support import names, pairs, published
from benchmarks.support.names import FILE_TOLERANCE, MODULES, TOLERANCE, Row
from benchmarks.support.pairs import REPRESENTATIVES, SHOWN_BY, SIGNALS_SHOWN_BY
from benchmarks.support.state import State
from tomexport.exporter.zoo import supported_names

TARGET = ROOT / "SUPPORT.md"
_HEAD = """# Supported models and methods

Written by `python -m benchmarks.support`, which computes all that stands here; `make test` checks
that it names the models and methods that there are. Of which code each row was found stands in
`benchmarks/results/support.json`.

## Methods and families

**right**: on a small model of the family, ONNX Runtime and OpenVINO give what PyTorch gives to
{file:g} of the largest output; that PyTorch computes the method's rule shows the test in the last
column, and that the family hands it the right keys, queries, values and attention shows
`{signals}`.
**approximate**: the same, but the rule is not quite the paper's; the plan says why. A number:
refused, for the reason below the table.

"""
_NAMES = """
## timm's names

**{right} of {total} names are right**, of timm's modules {modules}: with nothing to remove, the
reduced module equals the original to {tolerance:g} of the largest output; at `const:8` the sizes of
the tokens add up to the tokens that there were at every site, and ONNX Runtime gives what PyTorch
gives to {file:g}. A name that is not right is refused, with the reason. Methods that read the class
token's attention are refused where there is `no class token`.
"""
_PUBLISHED = """
## What the papers publish

Top-1 on ImageNet-1k and GMACs (papers call them FLOPs) as published, of weights trained with the
method, and our GMACs for the same model and schedule; they differ by more than 1 % and the
published digits only where it says why.

"""


def page(state: State) -> str:
    """Return the text of SUPPORT.md."""
    return "".join((*_methods(state), *_published(), *_names(state.names)))


def _methods(state: State) -> Iterator[str]:
    reasons: dict[str, int] = {}
    yield _HEAD.format(file=FILE_TOLERANCE, signals=SIGNALS_SHOWN_BY)
    yield _row("", *pairs.families(), "shown by")
    yield _row(*["---"] * (len(pairs.families()) + 2))
    for method in pairs.methods():
        cells = (_cell(state, family, method, reasons) for family in pairs.families())
        shown_by = SHOWN_BY.get(method)
        yield _row(f"`{method}`", *cells, f"`{shown_by}`" if shown_by else "")
    yield "\n"
    yield from (f"{number}. {reason}\n" for reason, number in reasons.items())
    yield "\nThe models: "
    yield ", ".join(f"{family} `{REPRESENTATIVES[family][0]}`" for family in pairs.families())
    yield ".\n"


def _cell(state: State, family: str, method: str, reasons: dict[str, int]) -> str:
    verdict = state.pairs[family][method].verdict
    kind, refused, reason = verdict.partition("refused: ")
    return str(reasons.setdefault(reason, len(reasons) + 1)) if refused else kind


def _published() -> Iterator[str]:
    yield _PUBLISHED
    yield _row("method", "model", "schedule", "top-1 %", "GMACs published", "ours", "")
    yield _row(*["---"] * 7)
    for each in published.FIGURES:
        ours = "–" if each.ours is None else f"{each.ours:.2f}"
        schedule = f"`{each.schedule}`" if each.schedule else "–"
        yield _row(
            each.method and f"`{each.method}`", f"`{each.model}`", schedule, each.top1, each.gmacs,
            ours, each.why,
        )  # fmt: skip
    yield "\nOf SReT GFLOPs as the slides count them: twice the products of layers, and norms.\n"
    yield "From: "
    yield "; ".join(f"{paper.method}: {paper.title}" for paper in published.PAPERS)
    yield ".\n"


def _names(rows: Mapping[str, Row]) -> Iterator[str]:
    right = sum(row.is_right for row in rows.values())
    modules = ", ".join(f"`{module}`" for module in MODULES)
    yield _NAMES.format(
        right=right, total=len(rows), tolerance=TOLERANCE, file=FILE_TOLERANCE, modules=modules
    )
    for module in MODULES:
        yield f"\n### {module}\n\n"
        yield _row("timm name", "parts", "`none`", "`const:8`")
        yield _row(*["---"] * 4)
        for name in supported_names((module,)):
            if name in rows:
                row = rows[name]
                yield _row(f"`{name}`", row.parts, row.none, row.merged)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def is_complete(state: State) -> bool:
    """Whether all that there is today was surveyed, and nothing else."""
    every = dict.fromkeys(pairs.methods())
    return list(state.names) == names.names() and all(
        list(state.pairs.get(family, {})) == list(every) for family in pairs.families()
    )
