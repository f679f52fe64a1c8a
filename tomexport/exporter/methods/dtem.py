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


def _n_features(site: Site) -> int:
    return 64 if site.width < _WIDE else 128


def _macs(site: Site, tokens: int) -> int:
    return tokens * site.width * _n_features(site)


def _weights(
    sites: Sequence[Site], steps: Sequence[Step], extras: Mapping[str, Tensor]
) -> list[Own | None]:
    pairs = zip(sites, steps, strict=True)
    return [_own(site, extras) if step.removed else None for site, step in pairs]


def _own(site: Site, extras: Mapping[str, Tensor]) -> Own:
    name = f"{site.block}.attn.qkv.metric_layer"
    bias = extras.get(f"{name}.bias")
    n_features = _n_features(site) if bias is None else bias.numel()
    return Own(name, nn.Linear(site.width, n_features))


DTEM = Method(
    name="dtem",
    needs=("normed",),
    counting=Counting(two_set_limit, macs=_macs),
    reduce=_reduce,
    weights=_weights,
)
