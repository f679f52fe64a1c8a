"""Top-K: the tokens that the class token attends to most are kept, the others dropped.

A baseline. Source: Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision
Transformers", ICCV Workshops 2023 (github.com/JoakimHaurum/TokenReduction); written from the paper.
"""

from __future__ import annotations

from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import class_score, keep_best
from tomexport.plan import Counting, all_but_one


def _choose(view: View) -> Choice:
    return keep_best(view, class_score(view))


TOPK = Method(
    name="topk",
    needs=("class_attention",),
    counting=Counting(all_but_one),
    reduce=by_choice(_choose),
    sizes=False,
    drops=True,
)
