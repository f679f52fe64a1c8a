"""Each timm name, at `none` and at `const:8`.

A name is built by timm with its own arguments, only 3 blocks deep and, above 192 channels, narrower
with the same channels per head; the image size is unchanged and every parameter is drawn away from
its initial value. It is right

- at `none` if the reduced module equals the original to 2e-6 of the largest output;
- at `const:8` if the sizes of the tokens add up, at every site, to the tokens that there were, and
  ONNX Runtime gives what PyTorch gives, on a generated image with natural statistics, to 1e-4 of
  the largest output.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

import tomexport
from tomexport.artifact import golden_images
from tomexport.errors import RewriteError
from tomexport.exporter.architecture import function_of
from tomexport.exporter.families import family_of
from tomexport.exporter.methods.method import Reduced, View
from tomexport.exporter.methods.tome import TOME
from tomexport.exporter.rewrite import ReducedModel
from tomexport.exporter.to_onnx import to_onnx
from tomexport.exporter.weights import seed_weights
from tomexport.exporter.zoo import blocks_only, skeleton, supported_names, timm

MODULES = (
    "vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos",
    "vision_transformer_hybrid", "naflexvit",
)  # fmt: skip
RIGHT = "right"
TOLERANCE, FILE_TOLERANCE = 2e-6, 1e-4
_OF_ONE_WIDTH = ("vit_base_mci_224",)  # whose stem gives the width of the blocks


@dataclass(frozen=True)
class Row:
    """What is known of a name.

    Attributes:
        parts: what it has beyond the plain ViT.
        none: the verdict with nothing removed.
        merged: the verdict at const:8; empty where it is refused.
        kind: names of one kind are the same small model, and are exported once.
        sources: the hash of the code that was found so.
    """

    parts: str
    none: str
    merged: str
    kind: str
    sources: str

    @property
    def is_right(self) -> bool:
        """Whether both verdicts are."""
        return self.none == self.merged == RIGHT


def names(patterns: Sequence[str] = ("*",)) -> list[str]:
    """Return the names surveyed that fit a pattern."""
    fits = (fnmatch.filter(supported_names(MODULES), pattern) for pattern in patterns)
    return list(dict.fromkeys(name for found in fits for name in found))


def row(name: str, sources: str, known: dict[str, str]) -> Row:
    """Return what is found of a name, and remember in `known` the verdict on its kind."""
    model = small(name)
    none, kind = verdict(model), kind_of(model)
    if none == RIGHT and kind not in known:
        known[kind] = merged_verdict(model)
    return Row(parts(model), none, known.get(kind, ""), kind, sources)


def small(name: str, depth: int = 3, width: int = 192) -> nn.Module:
    """Build a name with its own arguments, only less deep and, above `width`, narrower."""
    model: Any = skeleton(name, **blocks_only(name, 1))
    options = blocks_only(name, depth)
    if model.embed_dim > width and name not in _OF_ONE_WIDTH:
        per_head = model.embed_dim // _heads(model.blocks[0])
        n_heads = max(1, width // per_head)
        options |= {"embed_dim": per_head * n_heads, "num_heads": n_heads}
    if "num_kv_heads" in options:  # of its kinds of blocks, those that share keys
        options["num_kv_heads"] = 1
    return seed_weights(timm().create_model(name, **options), 1).eval()


def _heads(block: Any) -> int:
    with_heads = next(module for module in block.modules() if hasattr(module, "num_heads"))
    return int(with_heads.num_heads)


def verdict(model: nn.Module) -> str:
    """Compare a model with its reduced module at nothing to remove."""
    try:
        reduced = tomexport.reduce(model, "none")
    except RewriteError as err:
        return f"refused: {str(err).partition(': ')[2]}"
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *reduced.input_shape, generator=generator)
    with torch.no_grad():
        expected, found = model(image), reduced(image)
    return _judged(float((found - expected).abs().max() / expected.abs().max()), TOLERANCE)


def merged_verdict(model: nn.Module) -> str:
    """Compare PyTorch and ONNX Runtime at const:8, and add up the sizes at every site."""
    sums: list[Tensor] = []

    def reduce(view: View) -> Reduced:
        left = TOME.reduce(view)
        sums.append(left.size.sum(dim=(1, 2)))
        return left

    plan = tomexport.plan(model, "const:8")
    spied = ReducedModel(model, plan, dataclasses.replace(TOME, reduce=reduce))
    image = image_for(spied)
    with torch.no_grad():
        expected = spied(torch.from_numpy(image)).numpy()
    if len(sums) != plan.n_reductions or not sums:
        return f"WRONG: {len(sums)} of {plan.n_reductions} sites merged"
    if any((total - plan.steps[0].tokens_in).abs().max() > 1e-3 for total in sums):
        return f"WRONG: sizes add up to {[float(total[0]) for total in sums]}"
    content = exported(ReducedModel(model, plan, TOME))
    return judged(expected, in_onnxruntime(content, image))


def image_for(reduced: ReducedModel) -> np.ndarray:
    """Return a generated image with natural statistics, (1, channels, height, width)."""
    return np.asarray(golden_images(reduced.input_shape)[:1])


def exported(reduced: ReducedModel, *, portable: bool = False) -> bytes:
    """Return the file that would be written, without what it says of itself."""
    graph, _ = to_onnx(reduced, batch=1, opset=18, portable=portable)
    return bytes(ir.to_proto(graph).SerializeToString())


def in_onnxruntime(content: bytes, image: np.ndarray) -> np.ndarray:
    """Run a file on one image."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([session.get_outputs()[0].name], {"image": image})[0])


def judged(expected: np.ndarray, found: np.ndarray) -> str:
    """Return the verdict on what a runtime gives where PyTorch gives `expected`."""
    return _judged(float(np.abs(found - expected).max() / np.abs(expected).max()), FILE_TOLERANCE)


def _judged(error: float, tolerance: float) -> str:
    return RIGHT if error <= tolerance else f"WRONG by {error:.1e}"


def parts(model: Any) -> str:
    """Name what a model has beyond the plain ViT."""
    block = model.blocks[0]
    attn = getattr(block, "attn", None)
    has_class_token = getattr(
        model, "has_class_token", getattr(model, "cls_token", None) is not None
    )
    n_registers = model.num_prefix_tokens - has_class_token - hasattr(model, "dist_token")
    rope = getattr(model, "rope", None)
    mlp = type(getattr(block, "mlp", None)).__name__
    present = {
        type(block).__name__: type(block).__name__ not in ("Block", "EvaBlock", "RelPosBlock"),
        type(attn).__name__: type(attn).__name__ == "DiffAttention",
        type(rope).__name__: rope is not None,
        "shared relative positions": getattr(model, "shared_rel_pos", None) is not None,
        "distillation token": hasattr(model, "dist_token"),
        "no class token": not has_class_token,
        f"register tokens: {n_registers}": n_registers,
        "LayerScale": _is_there(block, "ls1") or getattr(block, "gamma_1", None) is not None,
        "qk-norm": _is_there(attn, "q_norm"),
        "attention norm": _is_there(attn, "norm"),
        "pre-norm": _is_there(model, "norm_pre"),
        "shared keys": getattr(attn, "num_kv_groups", 1) > 1,
        f"{model.global_pool} pooling": model.global_pool != "token",
        "no head": isinstance(model.head, nn.Identity),
        mlp: mlp not in ("Mlp", "NoneType"),
    }
    return ", ".join(name for name, there in present.items() if there)


def _is_there(owner: Any, name: str) -> bool:
    return not isinstance(getattr(owner, name, None), (nn.Identity, type(None)))


def kind_of(model: nn.Module) -> str:
    """Return a digest of all that decides what a seeded model computes: settings and shapes."""
    shapes = [(name, *parameter.shape) for name, parameter in model.named_parameters()]
    grid = family_of(model).input_shape(model)
    text = repr((function_of(model), shapes, grid))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
