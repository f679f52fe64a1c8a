"""The exact rewrites of the graph, each turned off alone: the forms that they replaced.

The package has no such options; here its parts are exchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import onnx_ir as ir
from torch import Tensor, nn

import tomexport
from tomexport.exporter import to_onnx
from tomexport.exporter.families import transformer
from tomexport.exporter.rewrite import ReducedModel
from tomexport.pipeline import DEFAULT_OPSET


def _family(reduced: ReducedModel, **parts: Any) -> None:
    reduced._family = dataclasses.replace(reduced._family, **parts)


@contextmanager
def _qkv(reduced: ReducedModel) -> Iterator[None]:
    """Cut q, k and v out of one tensor of five axes, a Slice for each, as timm does."""
    del reduced
    new_form = transformer.project

    def project(attn: Any, h: Tensor, n_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        if n_out is not None:  # the last block is another rewrite
            return new_form(attn, h, n_out)
        n_batch, n, _ = h.shape
        qkv = attn.qkv(h).reshape(n_batch, n, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    with mock.patch.object(transformer, "project", project):
        yield


@contextmanager
def _scale(reduced: ReducedModel) -> Iterator[None]:
    """Multiply the queries by the scale, in each block."""
    _family(reduced, fold=lambda model: None)
    yield


@contextmanager
def _layer_scale(reduced: ReducedModel) -> Iterator[None]:
    """Multiply by LayerScale after attention and MLP; the scale of the queries stays folded."""
    fold = reduced._family.fold

    def fold_scale(model: Any) -> None:
        kept = [(block, block.ls1, block.ls2) for block in model.blocks]
        for block, _, _ in kept:
            block.ls1 = block.ls2 = nn.Identity()
        fold(model)
        for block, ls1, ls2 in kept:
            block.ls1, block.ls2 = ls1, ls2

    _family(reduced, fold=fold_scale)
    yield


@contextmanager
def _last_block(reduced: ReducedModel) -> Iterator[None]:
    """Compute all tokens of the last block."""
    _family(reduced, n_read=lambda model: None)
    yield


@contextmanager
def _gelu(reduced: ReducedModel) -> Iterator[None]:
    """Leave GELU as PyTorch's exporter writes it."""
    del reduced
    with mock.patch.object(to_onnx, "_TRANSLATIONS", {}):
        yield


@contextmanager
def _bias(reduced: ReducedModel) -> Iterator[None]:
    """Leave biases with one axis, as PyTorch's exporter writes them."""
    del reduced
    with mock.patch.object(to_onnx, "_widen_biases", return_value=None):
        yield


# by the names of cases.REWRITES
WITHOUT: dict[str, Callable[[ReducedModel], AbstractContextManager[None]]] = {
    "qkv": _qkv,
    "scale": _scale,
    "LayerScale": _layer_scale,
    "last block": _last_block,
    "GELU": _gelu,
    "bias": _bias,
}


def export_without(name: str, model: nn.Module, batch: int, path: Path) -> None:
    """Write the unmerged export of a model without one of its rewrites."""
    reduced = tomexport.reduce(model, "none")
    with WITHOUT[name](reduced):
        graph, _ = to_onnx.to_onnx(reduced, batch=batch, opset=DEFAULT_OPSET, portable=False)
    ir.save(graph, path)
