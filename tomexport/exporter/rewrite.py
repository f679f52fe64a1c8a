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
        n_calls = len(self._family.cost(self.net, plan.model).sites)
        if len(plan.steps) != n_calls:
            raise PlanError(
                f"The plan has {len(plan.steps)} steps, the model {n_calls} block calls; "
                "make the plan from this model."
            )
        self.plan = plan
        self._calls = self._family.calls(self.net, plan.steps)
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
        other._calls = self._family.calls(other.net, self.plan.steps)
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
        targets: list[Tensor | None] = []  # of this stage
        for call, step in zip(self._calls, self.plan.steps, strict=True):
            n_out = family.n_read(self.net) if step is self.plan.steps[-1] else None
            x, signals = family.attention(call, x, size if self._prop_attn else None, n_out)
            if step.removed and n_out is None:
                signal = method.signal(signals)
                how: dict[str, Any] = {"r": step.removed, "n_prefix": self.plan.n_prefix}
                how["raster"] = family.raster
                before = x.new_ones(1, step.tokens_in, 1) if size is None else size
                x, size, target = method.operator(x, before, signal, **how)
                targets.append(target)
                if decisions is not None and target is not None:
                    decisions.append(Decision(target, method.operator.margin(signal, **how)))
            x = family.mlp(call, x)
            if step.restored:
                assert family.downsample is not None
                whole = _restored(x, targets, step.restored)
                x = family.downsample(self.net, step.stage + 1, whole)
                size, targets = None, []
        return family.head(self.net, x, size)


def _restored(x: Tensor, targets: list[Tensor | None], n: int) -> Tensor:
    """Give each of n tokens, (B, N, C), what the slot holds that it went to, (B, M, C).

    Args:
        x: the tokens that are left.
        targets: where tokens went, one map per reduction; None where nothing was chosen.
        n: tokens that there were.
    """
    # by way of int32: OpenVINO has no int64, and does not convert what operators of ours give
    maps = [target.int().long() for target in targets if target is not None]
    if not maps:
        places = torch.arange(n) * x.shape[1] // n  # evenly
        return x if x.shape[1] == n else x.index_select(1, places)
    place = maps[0]  # (B, N)
    for target in maps[1:]:
        place = target.gather(1, place)
    if not torch.onnx.is_in_onnx_export():
        return x.gather(1, place[:, :, None].expand(-1, -1, x.shape[2]))
    restored: Tensor = torch.onnx.ops.symbolic(  # torch has no name for a gather of whole rows
        "GatherND",
        (x, place[:, :, None]),
        {"batch_dims": 1},
        dtype=x.dtype,
        shape=(x.shape[0], n, x.shape[2]),
    )
    return restored


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
