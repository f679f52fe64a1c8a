"""What a reduction method is: where its counts end, what it looks at, and its operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tomexport.exporter.families.family import Signals
from tomexport.kernels.operators import Operator
from tomexport.plan import Limit


@dataclass(frozen=True)
class Method:
    """A way to reduce tokens between attention and MLP.

    Attributes:
        name: as on the command line.
        needs: the signals it looks at.
        limit: the most tokens it can remove at a site.
        signal: what its operator gets of the signals, (B, N, D).
        operator: the node that it becomes.
    """

    name: str
    needs: tuple[str, ...]
    limit: Limit
    signal: Callable[[Signals], Tensor]
    operator: Operator
