"""The .npz files of the authors of ViT and AugReg, whose weights are Flax's.

Source: Steiner et al., "How to train your ViT?", TMLR 2022 (github.com/google-research/
vision_transformer). Flax's GELU is the approximation by tanh, so it is here; timm's copies of these
weights compute the exact one.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial

from torch import Tensor, nn

from tomexport.errors import CheckpointError
from tomexport.exporter.layouts.layout import Names, Options, State, joined, renamed
from tomexport.exporter.layouts.timm import TIMM

_PREFIX = r"(?:opt/target/|params/)?"
_BLOCK = r"Transformer/encoderblock_(\d+)/"
_ATTENTION = rf"{_BLOCK}MultiHeadDotProductAttention_1/"
_NAMES: Names = (
    (r"cls", "cls_token"),
    (r"embedding/(.+)", r"patch_embed.proj.\1"),
    (r"Transformer/posembed_input/pos_embedding", "pos_embed"),
    (rf"{_BLOCK}LayerNorm_0/(.+)", r"blocks.\1.norm1.\2"),
    (rf"{_BLOCK}LayerNorm_2/(.+)", r"blocks.\1.norm2.\2"),
    (rf"{_ATTENTION}query/(.+)", r"blocks.\1.attn.0.\2"),
    (rf"{_ATTENTION}key/(.+)", r"blocks.\1.attn.1.\2"),
    (rf"{_ATTENTION}value/(.+)", r"blocks.\1.attn.2.\2"),
    (rf"{_ATTENTION}out/(.+)", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}MlpBlock_3/Dense_0/(.+)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}MlpBlock_3/Dense_1/(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"Transformer/encoder_norm/(.+)", r"norm.\1"),
    (r"head/(.+)", r"head.\1"),
)
_PER_HEAD = {1280: 80}  # width → channels of a head; 64 otherwise
_PARTS = re.compile(r"(blocks\.\d+\.attn\.)0\.(weight|bias)")


def _recognises(state: State) -> bool:
    return any(re.fullmatch(rf"{_PREFIX}{_BLOCK}LayerNorm_0/scale", key) for key in state)


def _rename(state: State, source: str) -> dict[str, Tensor]:
    """Name and lay out weights as timm does.

    Raises: CheckpointError if heads are of a size that the published models do not have, or parts
        of one layer do not go together.
    """
    named = {}
    for key, tensor in state.items():
        name = renamed(re.sub(f"^{_PREFIX}", "", key), _NAMES)
        if ".attn.0.kernel" in name:
            _check_heads(tensor, source)
        named[re.sub(r"(kernel|scale)$", "weight", name)] = _laid_out(name, tensor)
    for name in list(named):
        if found := _PARTS.fullmatch(name):
            parts = [f"{found[1]}{i}.{found[2]}" for i in range(3)]
            named[f"{found[1]}qkv.{found[2]}"] = joined(named, parts, source)
    return named


def _laid_out(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim == 4:  # (rows, columns, in, out)
        return tensor.permute(3, 2, 0, 1)
    if name.endswith(".attn.proj.kernel"):  # (heads, in, out)
        return tensor.flatten(0, -2).mT
    if name.endswith("kernel"):  # (in, out), or (in, heads, out)
        return tensor.flatten(1).mT
    return tensor.flatten() if ".attn." in name else tensor


def _check_heads(query: Tensor, source: str) -> None:
    """Refuse heads that timm's models of the same width do not have; query (C, heads, D)."""
    expected = _PER_HEAD.get(query.shape[0], 64)
    if query.shape[-1] != expected:
        raise CheckpointError(
            f"{source} has heads of {query.shape[-1]} channels at a width of {query.shape[0]}, "
            f"where the published models have {expected}. Build the model in Python and pass it."
        )


def _options(name: str, state: State, source: str) -> Options:
    return TIMM.options(name, state, source) | {"act_layer": partial(nn.GELU, approximate="tanh")}


AUGREG = dataclasses.replace(
    TIMM,
    name="AugReg",
    modules=("vision_transformer",),
    recognises=_recognises,
    rename=_rename,
    spare=((r"opt/state/.+", "the state of the optimizer"),),
    options=_options,
    extras=(),
)
