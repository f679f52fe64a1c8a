"""Merge in torch, written for reading: this defines what every other form must compute."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomexport.errors import PlanError
from tomexport.kernels.raster import in_raster_order


def parities(n_prefix: int) -> tuple[int, int]:
    """Return the first even and the first odd position after the prefix: where A and B begin."""
    return n_prefix + n_prefix % 2, n_prefix + 1 - n_prefix % 2


def _scores(signal: Float[Tensor, "B G N D"], n_prefix: int) -> Float[Tensor, "B A O"]:
    """Cosine similarity of every token of A with every token of B; −∞ where there is none."""
    first_a, first_b = parities(n_prefix)
    metric = signal.float().mean(dim=1)  # (B, N, D)
    direction = metric / metric.norm(dim=-1, keepdim=True)
    scores: Tensor = direction[:, first_a::2] @ direction[:, first_b::2].mT  # (B, |A|, |B|)
    return scores.nan_to_num(nan=-torch.inf)


def match(
    signal: Float[Tensor, "B G N D"], r: int, n_prefix: int, raster: bool = False
) -> Int[Tensor, "B N"]:
    """Match the r most redundant tokens of A to their nearest token of B.

    Args:
        signal: what similarity is measured on, averaged over its groups; for ToMe the keys, a
            group for each head.
        r: tokens to remove, 0 .. (N − n_prefix) // 2.
        n_prefix: tokens at the front that stay as they are.
        raster: number the slots by the first token of each.

    Returns:
        The slot of each token, 0 .. N − r − 1.

    Raises: PlanError if r is out of its range.
    """
    n_batch, _, n, _ = signal.shape
    device = signal.device
    if not 0 <= r <= (n - n_prefix) // 2:
        raise PlanError(
            f"Of {n} tokens with {n_prefix} protected, two-set matching can merge 0 to "
            f"{(n - n_prefix) // 2}, not {r}."
        )
    if r == 0:
        return torch.arange(n, device=device).expand(n_batch, n)
    best, partner = _scores(signal, n_prefix).max(dim=-1)  # (B, |A|); the first maximum wins
    order = best.argsort(dim=-1, descending=True, stable=True)
    sources, kept = order[:, :r], order[:, r:]
    if n_prefix:
        kept = kept.sort(dim=-1).values

    n_kept = kept.shape[1]
    first_b_slot = n_prefix + n_kept
    slots = torch.empty_like(partner)
    slots.scatter_(1, kept, n_prefix + torch.arange(n_kept, device=device).expand_as(kept))
    slots.scatter_(1, sources, first_b_slot + partner.gather(1, sources))

    first_a, first_b = parities(n_prefix)
    target = slots.new_empty(n_batch, n)
    target[:, :n_prefix] = torch.arange(n_prefix, device=device)
    target[:, first_a::2] = slots
    target[:, first_b::2] = torch.arange(first_b_slot, n - r, device=device)
    return in_raster_order(target, n - r) if raster else target


def margin(
    signal: Float[Tensor, "B G N D"], r: int, n_prefix: int, raster: bool = False
) -> Float[Tensor, " B"]:
    """Return how far the nearest other decision is, in units of cosine similarity.

    A form whose scores are off by less than half of this must decide the same. Where nothing is
    decided it is endless; tokens without direction are tied.
    """
    # without a prefix, unless in raster order, the tokens that are kept are ranked too
    return margin_of(_scores(signal, n_prefix), r, ranks_kept=not (n_prefix or raster))


def margin_of(scores: Float[Tensor, "B A O"], r: int, *, ranks_kept: bool) -> Float[Tensor, " B"]:
    """Return how far the nearest other decision is of matching by scores, in their units.

    Args:
        scores: of every token of A with every token of B.
        r: tokens to remove.
        ranks_kept: whether the order of the tokens that are kept is a decision, too.
    """
    result = scores.new_full((scores.shape[0],), torch.inf, dtype=torch.float32)
    if r == 0:
        return result
    ranked = scores.max(dim=-1).values.sort(dim=-1, descending=True)
    gaps = ranked.values[:, :-1] - ranked.values[:, 1:]  # (B, |A|−1): rank i from rank i + 1
    deciding = gaps[:, r - 1 :] if ranks_kept else gaps[:, r - 1 : r]
    if deciding.shape[1]:
        result = torch.minimum(result, deciding.amin(dim=-1))
    if scores.shape[2] > 1:
        merged = scores.gather(1, ranked.indices[:, :r, None].expand(-1, -1, scores.shape[2]))
        first, second = merged.topk(2, dim=-1).values.unbind(-1)  # (B, r)
        result = torch.minimum(result, (first - second).amin(dim=-1))
    return result.nan_to_num(nan=0.0, posinf=torch.inf)  # NaN: −∞ less −∞


def merge(
    x: Float[Tensor, "B N C"],
    size: Float[Tensor, "S N 1"],
    signal: Float[Tensor, "B G N D"],
    *,
    r: int,
    n_prefix: int,
    raster: bool = False,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B M 1"], Int[Tensor, "B N"]]:
    """Merge r tokens: x becomes the size-weighted mean, sizes add up.

    Args:
        x: tokens.
        size: how many original tokens each stands for; S is B, or 1 where all images agree.
        signal: see `match`.
        r: tokens to remove.
        n_prefix: protected tokens at the front.
        raster: put each slot where its first token stood.

    Returns:
        The tokens that are left, their sizes, and the slot that each token went to.
    """
    target = match(signal, r, n_prefix, raster)
    n_batch, n, n_channels = x.shape
    size = size.expand(n_batch, n, 1)
    slot = target[:, :, None]  # (B, N, 1)
    total = x.new_zeros(n_batch, n - r, n_channels)
    total.scatter_add_(1, slot.expand(-1, -1, n_channels), x * size)
    merged_size = size.new_zeros(n_batch, n - r, 1).scatter_add_(1, slot, size)
    return total / merged_size, merged_size, target
