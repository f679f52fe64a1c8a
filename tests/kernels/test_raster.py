"""Slots numbered by their first tokens, against a plain loop; the ONNX form runs in test_merge."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tomexport.kernels.raster import in_raster_order


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_slots_are_numbered_as_their_first_tokens_come(slots: list[int]) -> None:
    names = sorted(set(slots))
    target = [names.index(slot) for slot in slots]  # every number has a token
    seen: list[int] = []
    for slot in target:
        seen += [] if slot in seen else [slot]
    expected = [seen.index(slot) for slot in target]
    both = torch.tensor([target, target[::-1]])
    found = in_raster_order(both, len(names))
    assert found[0].tolist() == expected
    assert found.dtype == torch.int64
