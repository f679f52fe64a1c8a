"""DTEM: tokens merge as in ToMe, by an embedding of their own instead of the keys.

Source: Lee and Hong, "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision
Transformers", NeurIPS 2024 (github.com/movinghoon/DTEM); written from the paper.

Each block has one linear layer more, which embeds what the block projects to queries, keys and
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tomexport.exporter.methods.method import Method, Own, Reduced, View
from tomexport.exporter.methods.tome import merge
from tomexport.plan import Counting, Site, Step, two_set_limit

_WIDE = 1024  # channels from which on the embedding is twice as wide


def _reduce(view: View) -> Reduced:
    assert view.weights is not None
    embedding = view.weights(view.attended.normed)  # (B, N, F)
    return merge(view, embedding[:, None])


def _name(site: Site) -> str:
    return f"{site.block}.attn.qkv.metric_layer"


def _n_features(site: Site, extras: Mapping[str, Tensor]) -> int:
    """Return how wide the embedding is in a file, or as the paper has it."""
    bias = extras.get(f"{_name(site)}.bias")
    return bias.numel() if bias is not None else 64 if site.width < _WIDE else 128


def _weights(
    sites: Sequence[Site], steps: Sequence[Step], extras: Mapping[str, Tensor]
) -> list[Own | None]:
    return [
        Own(_name(site), nn.Linear(site.width, _n_features(site, extras))) if step.removed else None
        for site, step in zip(sites, steps, strict=True)
    ]


def _dtem(extras: Mapping[str, Tensor]) -> Method:
    def macs(site: Site, tokens: int) -> int:
        return tokens * site.width * _n_features(site, extras)

    return Method(
        name="dtem",
        needs=("normed",),
        counting=Counting(two_set_limit, macs=macs),
        reduce=_reduce,
        weights=_weights,
        fitted=_dtem,
    )


DTEM = _dtem({})
