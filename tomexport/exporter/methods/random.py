"""Random: tokens drawn once, the same for all images, are kept, the others dropped.

A baseline: what a method must beat. Each place draws anew, from a seed that is the number of tokens
it meets.
"""

from __future__ import annotations

import numpy as np
import torch

from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import keep_best
from tomexport.plan import Counting, all_but_one


def _choose(view: View) -> Choice:
    n = view.step.tokens_in - view.n_prefix
    order = torch.from_numpy(np.random.default_rng(n).permutation(n)).float()
    choice = keep_best(view, order.expand(view.x.shape[0], n))
    return choice._replace(margin=None)


RANDOM = Method(
    name="random",
    needs=(),
    counting=Counting(all_but_one),
    reduce=by_choice(_choose),
    sizes=False,
    drops=True,
)
