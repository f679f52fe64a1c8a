"""eTPS: the tokens that the class token attends to are kept, the others squeezed into them.

Source: Wei et al., "Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision
Transformers", CVPR 2023; written from the paper. No code of it was published (that of
github.com/megvii-research/TPS-CVPR2023 is of dTPS), so how shares count is our choice: as in dTPS,
of the tokens at first, one share standing for itself, its square and its cube.

A token's score is that of EViT; the kept ones stand in the order of their scores.
"""

from __future__ import annotations

from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import class_score, squeeze_best
from tomexport.plan import Counting, all_but_one, keep_of_first


def _choose(view: View) -> Choice:
    return squeeze_best(view, class_score(view))


ETPS = Method(
    name="etps",
    needs=("class_attention",),
    counting=Counting(all_but_one, keep_of_first, powers=True),
    reduce=by_choice(_choose),
    sizes=False,
)
