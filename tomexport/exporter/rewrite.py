"""(model, plan, method) → reduced module: a new module around the user's weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tomexport.errors import PlanError, RewriteError
from tomexport.exporter.families import family_of
from tomexport.exporter.families.family import Family
from tomexport.exporter.methods.method import Method
from tomexport.plan import Plan


@dataclass(frozen=True)
class Decision:
    """What one reduction decided.

    Attributes:
        target: (B, N) slot of each token.
        margin: (B,) how far the nearest other decision was, in units of the method's score.
    """

    target: Tensor
    margin: Tensor


class ReducedModel(nn.Module):
    """A vision transformer that reduces its tokens as a plan says.

    It shares the parameters of the model it was made from and leaves that model as it was.
    Input (B, channels, height, width) float32, output (B, classes), or features without a head.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, method: Method, *, prop_attn: bool = True
    ) -> None:
        """Wrap a model.

        Args:
            model: the original; its parameters are shared, nothing else.
            plan: token counts, one step per block call.
            method: how tokens are chosen.
            prop_attn: weight keys by the number of patches they stand for.

        Raises: RewriteError if the model's family cannot give what the method needs.
        """
        super().__init__()
        self._family: Family = family_of(model)
        missing = sorted(set(method.needs) - set(self._family.signals))
        if missing:
            raise RewriteError(
                f"{method.name} needs {', '.join(missing)}, which the family "
                f"{self._family.name!r} does not give; it gives {', '.join(self._family.signals)}."
            )
        self.net = private_copy(model)
        self._family.prepare(self.net)
        n_calls = len(self._family.blocks(self.net))
        if len(plan.steps) != n_calls:
            raise PlanError(
                f"The plan has {len(plan.steps)} steps, the model {n_calls} block calls; "
                "make the plan from this model."
            )
        self.plan = plan
        self._method = method
        self._prop_attn = prop_attn
        self.eval()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the image."""
        return self._family.input_shape(self.net)

    @property
    def output(self) -> str:
        """What comes out: "logits" or "features"."""
        return self._family.output(self.net)

    def folded(self) -> ReducedModel:
        """Return a copy that computes the same with fewer operations, for export."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.net = private_copy(self.net)
        self._family.fold(other.net)
        return other

    def forward(self, image: Tensor) -> Tensor:
        """Compute the model on the reduced tokens."""
        return self._run(image, None)

    def trace(self, image: Tensor) -> tuple[Tensor, list[Decision]]:
        """Compute the model and record what each reduction decided."""
        decisions: list[Decision] = []
        return self._run(image, decisions), decisions

    def _run(self, image: Tensor, decisions: list[Decision] | None) -> Tensor:
        family, method = self._family, self._method
        x = family.embed(self.net, image)  # (B, N, C)
        size: Tensor | None = None
        calls = list(zip(family.blocks(self.net), self.plan.steps, strict=True))
        for block, step in calls:
            n_out = family.n_read(self.net) if step is calls[-1][1] else None
            x, signals = family.attention(block, x, size if self._prop_attn else None, n_out)
            if step.removed and n_out is None:
                signal = method.signal(signals)
                counts = {"r": step.removed, "n_prefix": self.plan.n_prefix}
                before = x.new_ones(1, step.tokens_in, 1) if size is None else size
                x, size, target = method.operator(x, before, signal, **counts)
                if decisions is not None and target is not None:
                    margin = method.operator.margin(signal, **counts)
                    decisions.append(Decision(target, margin))
            x = family.mlp(block, x)
        return family.head(self.net, x, size)


def private_copy(model: nn.Module) -> Any:
    """Copy a module tree, sharing its tensors, so that no setting of ours reaches the original."""
    tensors = chain(model.parameters(), model.buffers())
    odd = {str(t.dtype) for t in model.parameters() if t.dtype != torch.float32}
    if odd:
        raise RewriteError(
            f"The model has parameters of type {', '.join(sorted(odd))}; the choice of tokens is "
            "made in float32. Convert it first: model.float()"
        )
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
