"""Random: tokens drawn once, the same for all images, are kept, the others dropped.

A baseline: what a method must beat. Each place draws anew, from a seed that is the number of tokens
it meets.
"""

from __future__ import annotations

import numpy as np
import torch

from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import NOWHERE
from tomexport.plan import Counting, all_but_one


def _choose(view: View) -> Choice:
    n_prefix, n_out, n_in = view.n_prefix, view.step.tokens_out, view.step.tokens_in
    n = n_in - n_prefix
    slot = n_in - 1 - np.random.default_rng(n).permutation(n)  # the highest number comes first
    target = np.concatenate([np.arange(n_prefix), np.where(slot < n_out, slot, NOWHERE)])
    return Choice(
        target=torch.from_numpy(target).expand(view.x.shape[0], n_in),
        weight=view.x.new_ones(1, n_in),
        mean=False,
        margin=None,
    )


RANDOM = Method(
    name="random",
    needs=(),
    counting=Counting(all_but_one),
    reduce=by_choice(_choose),
    sizes=False,
    drops=True,
)
