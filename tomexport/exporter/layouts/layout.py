"""What a checkpoint layout is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a kind of checkpoint names its weights.

    Attributes:
        name: what the layout is called.
        recognises: whether a state dict is of this layout.
        rename: state dict → the same weights under timm's names.
        spare: key patterns that the forward pass of the plain model never reads, and why.
    """

    name: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    spare: tuple[tuple[str, str], ...]
