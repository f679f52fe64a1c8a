"""Reduce in torch: this defines what every other form must compute."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def reduce(
    x: Float[Tensor, "B N C"],
    mass: Float[Tensor, "B N 1"],
    target: Int[Tensor, "B N"],
    weight: Float[Tensor, "B N 1"],
    *,
    r: int,
    mean: int,
    fixed: int = 0,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B M 1"]]:
    """Sum tokens into their slots.

    Args:
        x: tokens.
        mass: what each adds to the size of its slot.
        target: slot of each, 0 .. N − r − 1, or −1 for none.
        weight: of each in its slot.
        r: how many fewer slots there are than tokens.
        mean: 1 to divide by the sum of the weights of a slot, 0 not to.
        fixed: 1 if the target is the same for all images.

    Returns:
        The slots and their sizes.
    """
    del fixed
    n_batch, n, n_channels = x.shape
    slot = target[:, :, None]  # (B, N, 1)
    stays = (slot >= 0).to(x.dtype)
    slot = slot.clamp(min=0)
    weight = weight * stays
    total = x.new_zeros(n_batch, n - r, n_channels)
    total.scatter_add_(1, slot.expand(-1, -1, n_channels), x * weight)
    if mean:
        total /= weight.new_zeros(n_batch, n - r, 1).scatter_add_(1, slot, weight)
    size = mass.new_zeros(n_batch, n - r, 1).scatter_add_(1, slot, mass * stays)
    return total, size
