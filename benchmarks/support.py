"""Write SUPPORT.md: which timm names are right, and why the rest are refused.

Each name is built by timm with its own arguments, only 3 blocks deep and, above 192 channels,
narrower with the same channels per head; the image size is unchanged and every parameter is drawn
away from its initial value. A name is right if the reduced module with nothing to remove equals
the original to 2e-6 of the largest output.

    python benchmarks/support.py            write SUPPORT.md
    python benchmarks/support.py --check    fail if SUPPORT.md is not what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tomexport
from tomexport.errors import RewriteError
from tomexport.exporter.families.vit import VIT
from tomexport.exporter.weights import seed_weights
from tomexport.exporter.zoo import skeleton, supported_names, timm

TARGET = Path(__file__).parents[1] / "SUPPORT.md"
TOLERANCE = 2e-6
_HEAD = """# Supported models

Written by `python benchmarks/support.py`, which builds every name of timm's modules
`vision_transformer` and `deit` and compares; `make test` checks that this page is current.

**{right} of {total} names are right**: with nothing to remove, the reduced module equals the
original to {tolerance:g} of the largest output. The rest are refused by name, with the reason.

| timm name | parts | verdict |
|---|---|---|
"""


def small(name: str, depth: int = 3, width: int = 192) -> nn.Module:
    """Build a name with its own arguments, only less deep and, above `width`, narrower."""
    model: Any = skeleton(name, depth=1)
    options: dict[str, Any] = {"depth": depth}
    if model.embed_dim > width:
        per_head = model.embed_dim // _heads(model.blocks[0])
        n_heads = max(1, width // per_head)
        options |= {"embed_dim": per_head * n_heads, "num_heads": n_heads}
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
    error = float((found - expected).abs().max() / expected.abs().max())
    return "right" if error <= TOLERANCE else f"WRONG by {error:.1e}"


def parts(model: Any) -> str:
    """Name what a model has beyond the plain ViT."""
    block = model.blocks[0]
    attn = getattr(block, "attn", None)
    present = {
        "distillation token": hasattr(model, "dist_token"),
        "no class token": not model.has_class_token,
        f"register tokens: {model.num_reg_tokens}": model.num_reg_tokens,
        "LayerScale": _is_there(getattr(block, "ls1", None)),
        "qk-norm": _is_there(getattr(attn, "q_norm", None)),
        "attention norm": _is_there(getattr(attn, "norm", None)),
        "pre-norm": _is_there(model.norm_pre),
        f"{model.global_pool} pooling": model.global_pool != "token",
        "no head": isinstance(model.head, nn.Identity),
        type(block.mlp).__name__ if hasattr(block, "mlp") else "": hasattr(block, "mlp")
        and type(block.mlp).__name__ != "Mlp",
    }
    return ", ".join(name for name, there in present.items() if there)


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield name, parts and verdict of every name."""
    for name in supported_names(VIT.modules):
        model = small(name)
        yield name, parts(model), verdict(model)


def page() -> str:
    """Return SUPPORT.md."""
    table = list(rows())
    right = sum(row[2] == "right" for row in table)
    head = _HEAD.format(right=right, total=len(table), tolerance=TOLERANCE)
    return head + "".join(f"| `{name}` | {has} | {word} |\n" for name, has, word in table)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == text else "SUPPORT.md is out of date; write it again")
    TARGET.write_text(text)
