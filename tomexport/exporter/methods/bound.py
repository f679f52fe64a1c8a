"""The free-merge bound: what a method's graph would cost if reducing were free.

Every reduction is replaced by one Slice of the tokens, which keeps as many and chooses nothing. The
sizes become a constant, so that the size bias of the attention stays in the graph. What such a
model predicts means nothing; its speed is what the merged model's is measured against.

In bfloat16 OpenVINO 2026.4 does not even predict that: it reads a constant bias that serves all
heads wrongly. A bias for each head is read right and takes as long (0.4 % less), so the speed
stands.
"""

from __future__ import annotations

import dataclasses

from tomexport.exporter.methods.method import Method, Reduced, View


def _slice(view: View) -> Reduced:
    """Keep the first tokens, each of the same size; nothing is decided."""
    x, left = view.x, view.step.tokens_out
    size = x.new_full((1, left, 1), view.step.tokens_in / left)
    return Reduced(x[:, :left], size, None, None)


def bound_of(method: Method) -> Method:
    """Return the free-merge bound of a method: the same counts at the same places."""
    name = f"bound:{method.name}"
    return dataclasses.replace(
        method,
        name=name,
        needs=(),
        reduce=_slice,
        weights=None,
        fitted=None,
        remember=None,
        asked=None,
    )
