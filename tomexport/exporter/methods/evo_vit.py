"""Evo-ViT: the tokens that the class token attended to most are computed; the others wait.

Source: Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", AAAI 2022
(github.com/YifanXu74/Evo-ViT); written from the paper, but for the token that represents those that
wait, which the published code has not.

A token's score is what the class token attends to, summed over the heads, in the last block before
any token waited; from then on the mean of what it was and what each block adds, in which those that
wait keep theirs. They come back where the next ones are chosen, and at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tomexport.exporter.families.family import Signals
from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import keep_best
from tomexport.plan import BEFORE, Counting, all_but_one, keep_of_first


def _remember(memory: Tensor | None, signals: Signals, target: Tensor | None) -> Tensor:
    """Return the score of every token, (B, N), those that wait included."""
    assert signals.class_attention is not None
    attended = signals.class_attention().sum(dim=1)  # (B, M)
    if memory is None or target is None:
        return attended
    now = attended.gather(1, target.clamp(min=0))
    return torch.where(target < 0, memory, (memory + now) / 2)


def _choose(view: View) -> Choice:
    assert view.memory is not None
    return keep_best(view, view.memory[:, view.n_prefix :])


EVO_VIT = Method(
    name="evo-vit",
    needs=("class_attention",),
    counting=Counting(all_but_one, keep_of_first, place=BEFORE, waits=True),
    reduce=by_choice(_choose),
    sizes=False,
    remember=_remember,
)
