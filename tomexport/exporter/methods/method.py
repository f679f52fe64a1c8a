"""What a reduction method is: where its counts end, what it looks at, and its operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tomexport.exporter.families.family import Signals
from tomexport.plan import Limit


class Reduction(Protocol):
    """What takes r tokens away; the operators of `kernels/` do."""

    def __call__(
        self, x: Tensor, size: Tensor, signal: Tensor, *, r: int, n_prefix: int, raster: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x (B, M, C), size (B, M, 1) and target (B, N); None if nothing was chosen.

        With `raster`, what is left stands in the order of the tokens that came first to each slot.
        """
        ...

    @property
    def margin(self) -> Callable[..., Tensor]:
        """How far the nearest other decision is, (B,), from the signal alone."""
        ...


@dataclass(frozen=True)
class Method:
    """A way to reduce tokens between attention and MLP.

    Attributes:
        name: as on the command line.
        needs: the signals it looks at.
        limit: the most tokens it can remove at a site.
        signal: what its operator gets of the signals, (B, G, N, D).
        operator: the node that it becomes.
    """

    name: str
    needs: tuple[str, ...]
    limit: Limit
    signal: Callable[[Signals], Tensor]
    operator: Reduction
