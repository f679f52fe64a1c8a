"""ATS with a fixed budget: the tokens of the highest significance are kept, the others dropped.

Source: Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022
(github.com/adaptivetokensampling/ATS); written from the paper.

A token's significance is what the class token attends to, summed over the heads, times the length
of its value. ATS samples by it, and takes more or fewer tokens as an image asks for; here a place
keeps the same number for all images, and those are the best.
"""

from __future__ import annotations

from torch import Tensor

from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import class_score, keep_best
from tomexport.plan import Counting, all_but_one

_NOTE = (
    "an approximation of ATS: each place keeps as many tokens of every image, the most "
    "significant, where ATS samples as many as the image asks for"
)


def _choose(view: View) -> Choice:
    values = view.attended.values
    assert values is not None
    length: Tensor = values.square().sum(dim=(1, 3)).sqrt()  # (B, N), over all heads
    return keep_best(view, class_score(view) * length[:, view.n_prefix :])


ATS = Method(
    name="ats",
    needs=("class_attention", "values"),
    counting=Counting(all_but_one, note=_NOTE),
    reduce=by_choice(_choose),
    sizes=False,
    drops=True,
)
