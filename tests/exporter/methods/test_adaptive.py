"""Methods without fixed counts are refused by name, with what to use instead."""

from __future__ import annotations

import pytest

import tomexport
from tomexport.errors import RewriteError
from tomexport.exporter.methods import METHODS


@pytest.mark.parametrize(
    ("name", "instead"), [("a-vit", "topk"), ("spvit", "evit"), ("ia-red2", "dynamicvit")]
)
@pytest.mark.parametrize("form", ["{}", "bound:{}", "{}:fuse=no"])
def test_refused(name, instead, form):
    with pytest.raises(RewriteError, match="has no fixed counts") as caught:
        tomexport.plan("test_vit", "keep:0.7@1", method=form.format(name))
    assert instead in {method.name for method in METHODS}
    assert instead in str(caught.value)
