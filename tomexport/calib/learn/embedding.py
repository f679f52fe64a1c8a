"""The embedding of each block: where it starts, and the checkpoint that holds it in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tomexport.errors import need

KEY = "attn.qkv.metric_layer"
_FAINT = 0.01  # of the keys' own scale: what lies beyond them starts small, but not at 0


def starting_from_keys(attn: Any, dim: int, seed: int) -> nn.Linear:
    """Make the embedding of a block that compares tokens as its keys do.

    ToMe compares the mean of the keys over the heads, which is linear in what the block projects:
    an embedding as wide as a head is exactly that. A narrower one keeps the directions along which
    the weights of that mean are largest; a wider one has faint random features besides.

    Args:
        attn: timm's Attention.
        dim: features of the embedding.
        seed: for the features beyond the keys'.
    """
    keys = slice(attn.attn_dim, 2 * attn.attn_dim)
    weight = _mean_of_heads(attn.qkv.weight[keys], attn)  # (D, C)
    bias = weight.new_zeros(len(weight))
    if attn.qkv.bias is not None:
        bias = _mean_of_heads(attn.qkv.bias[keys], attn)
    if dim < len(weight):
        rotation = torch.linalg.svd(weight, full_matrices=False).U[:, :dim].mT  # (dim, D)
        weight, bias = rotation @ weight, rotation @ bias
    elif dim > len(weight):
        generator = torch.Generator().manual_seed(seed)
        more = torch.randn(dim - len(weight), weight.shape[1], generator=generator)
        weight = torch.cat([weight, more * weight.std() * _FAINT])
        bias = torch.cat([bias, bias.new_zeros(len(more))])
    layer = nn.Linear(weight.shape[1], dim)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _mean_of_heads(rows: Tensor, attn: Any) -> Tensor:
    return rows.reshape(attn.num_heads, attn.head_dim, *rows.shape[1:]).mean(dim=0)


def checkpoint(model: nn.Module, embeddings: Sequence[nn.Linear]) -> dict[str, Tensor]:
    """Return the weights of a model with embeddings, under the names that DTEM publishes.

    Each block's projections are held twice: apart, as they are trained, and as one, as they run.
    """
    state = dict(model.state_dict())
    for index, layer in enumerate(embeddings):
        start = f"blocks.{index}.attn.qkv"
        own = layer.state_dict()
        for kind in ("weight", "bias"):
            qkv = state.pop(f"{start}.{kind}", None)
            if qkv is not None:
                state[f"{start}.qkv_layer.{kind}"] = qkv
                state[f"{start}.{kind}"] = torch.cat([qkv, own[kind]])
            state[f"blocks.{index}.{KEY}.{kind}"] = own[kind]
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def write(state: Mapping[str, Tensor], architecture: str | None, path: Path) -> None:
    """Write a checkpoint that names its architecture; .safetensors, or .pth for any other."""
    if path.suffix == ".safetensors":
        metadata = {"architecture": architecture} if architecture else {}
        # save_file would make a file that only its owner can read
        path.write_bytes(need("safetensors.torch", "export").save(dict(state), metadata))
        return
    named = {"arch": architecture} if architecture else {}
    torch.save({"state_dict": dict(state), **named}, path)


def attach(model: nn.Module, embeddings: Sequence[nn.Linear]) -> None:
    """Let a module carry its embeddings, where `tomexport.export` finds them.

    Its own forward pass stays as it is.
    """
    for index, layer in enumerate(embeddings):
        parent, _, name = f"blocks.{index}.{KEY}".rpartition(".")
        model.get_submodule(parent).add_module(name, layer)
