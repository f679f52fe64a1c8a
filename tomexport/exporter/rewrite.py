"""(model, plan, method) → reduced module: a new module around the user's weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from tomexport.artifact import TOKENS
from tomexport.errors import PlanError, RewriteError
from tomexport.exporter.families import family_of
from tomexport.exporter.families.family import Family, Signals, Tokens
from tomexport.exporter.gather import at_places, entries
from tomexport.exporter.methods.method import Method, Reduced, View
from tomexport.plan import BEFORE, BETWEEN, Plan, Step


@dataclass(frozen=True)
class Decision:
    """What one reduction decided.

    Attributes:
        target: (B, N) slot of each token, −1 for none.
        margin: (B,) how far the nearest other decision was, in units of the method's score.
        asked: (B,) how many tokens the paper's method would leave; None where all images ask for
            as many.
    """

    target: Tensor
    margin: Tensor
    asked: Tensor | None = None


class ReducedModel(nn.Module):
    """A vision transformer that reduces its tokens as a plan says.

    It shares the parameters of the model it was made from and leaves that model as it was.
    Input (B, channels, height, width) float32; output (B, classes), or features (B, C) without a
    head. Where tokens are asked for, (B, N, C), one for each patch, the prefix left out: what its
    slot holds in the end, after the final norm, if that comes before pooling.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, method: Method, *, prop_attn: bool = True,
        own: Sequence[nn.Module | None] = (), output: str | None = None,
    ) -> None:  # fmt: skip
        """Wrap a model.

        Args:
            model: the original; its parameters are shared, nothing else.
            plan: token counts, one step per block call.
            method: how tokens are chosen.
            prop_attn: weight keys by the number of patches they stand for.
            own: the method's own weights, one per step; see `own_weights.py`.
            output: "tokens" for one feature of each patch; None is what the model puts out.

        Raises: RewriteError if the model's family cannot give what the method needs.
        """
        super().__init__()
        self._family: Family = family_of(model)
        _check_method(method, plan, self._family, output)
        self.net = private_copy(model)
        self._family.prepare(self.net)
        n_calls = len(self._family.cost(self.net, plan.model).sites)
        if len(plan.steps) != n_calls:
            raise PlanError(
                f"The plan has {len(plan.steps)} steps, the model {n_calls} block calls; "
                "make the plan from this model."
            )
        self.plan = plan
        self._tokens = output == TOKENS
        self._calls = self._family.calls(self.net, plan.steps)
        self._method = method
        self._weighs_keys = prop_attn and method.sizes and method.weighs_keys
        self._come_back = self._tokens or any(step.restored for step in plan.steps)
        self.own = nn.ModuleDict({str(i): each for i, each in enumerate(own) if each is not None})
        self.eval()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the image."""
        return self._family.input_shape(self.net)

    @property
    def output(self) -> str:
        """What comes out: "logits", "features" or "tokens"."""
        return TOKENS if self._tokens else self._family.output(self.net)

    def original(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute what the original model would put out in the place of this one."""
        if not self._tokens:
            return cast(Tensor, model(image))
        return self._family.features(model, image)[:, self.plan.n_prefix :]

    @property
    def counts_by_image(self) -> bool:
        """Whether the paper's method would leave other numbers of tokens of other images."""
        return self._method.asked is not None

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
        at = self.begin(image)
        for _ in self.plan.steps:
            at = self.advance(at, decisions)
        return self.finish(at)

    def begin(self, image: Tensor) -> Midway:
        """Embed images, (B, channels, height, width)."""
        return Midway(self._family.embed(self.net, image), 0, _Stage())

    def advance(self, at: Midway, decisions: list[Decision] | None = None) -> Midway:
        """Compute the next block call; what it goes on from stays as it was."""
        family, call, step = self._family, self._calls[at.done], self.plan.steps[at.done]
        is_last = step is self.plan.steps[-1] and not self._tokens
        n_out = family.n_read(self.net) if is_last else None
        state = dataclasses.replace(at.state)
        x = before = at.x
        if step.place == BEFORE and step.removed:
            x = self._reduce(x, before, None, at.done, state, decisions)
        size = state.size if self._weighs_keys else None
        slot = state.slot if family.grid else None
        x, signals = family.attention(call, Tokens(x, size, state.place, slot), n_out)
        if self._method.remember and self.plan.removed_total:
            state.memory = self._method.remember(state.memory, signals, state.target)
        if step.place == BETWEEN and step.removed and n_out is None:
            x = self._reduce(x, before, signals, at.done, state, decisions)
        x = family.mlp(call, x)
        if step.restored and n_out is None:
            x = _restored(x, state, step.restored)
            state = _Stage(memory=state.memory)
            if family.downsample is not None:
                x = family.downsample(self.net, step.stage + 1, x)
        return Midway(x, at.done + 1, state)

    def finish(self, at: Midway) -> Tensor:
        """Compute the output after the last call."""
        if self._tokens:
            return self._each_patch(self._family.norm(self.net, at.x), at.state)
        return self._family.head(self.net, at.x, at.state.size if self._method.sizes else None)

    def _each_patch(self, x: Tensor, state: _Stage) -> Tensor:
        """Give each patch, (B, N, C), what the slot holds that it ended in."""
        first = next(s for s in self.plan.steps if s.stage == self.plan.steps[-1].stage)
        return _restored(x, state, first.tokens_in)[:, self.plan.n_prefix :]

    def _reduce(
        self, x: Tensor, before: Tensor, signals: Signals | None, index: int, state: _Stage,
        decisions: list[Decision] | None,
    ) -> Tensor:  # fmt: skip
        step, key = self.plan.steps[index], str(index)
        size = x.new_ones(1, step.tokens_in, 1) if state.size is None else state.size
        own = self.own[key] if key in self.own else None  # noqa: SIM401  it has no get
        view = View(
            x, before, size, signals, step, step.n_prefix, self._family.raster, own,
            index, len(self.plan.steps), state.memory,
        )  # fmt: skip
        left = self._method.reduce(view)
        state.size = left.size
        state.target = left.target
        if left.target is not None and (self._come_back or self._family.grid):
            state.slot = _slots(left.target, state.slot)
        state.waiting = x if self._method.counting.waits else None
        if self._family.places:
            state.place = _places(left, state.place, step)
        if decisions is not None and left.target is not None and left.margin is not None:
            asked = self._method.asked(view) if self._method.asked else None
            decisions.append(Decision(left.target, left.margin(), asked))
        return left.x


@dataclass(frozen=True)
class Midway:
    """A run between two block calls: another plan that begins alike can go on from it.

    Attributes:
        x: (B, N, C), the tokens.
        done: how many calls were computed.
        state: what the rest of the run needs to know.
    """

    x: Tensor
    done: int
    state: _Stage


@dataclass
class _Stage:
    """What a run remembers of its stage.

    Attributes:
        size: of each token; None while nothing has been removed.
        place: where each is from; None while all are where they were.
        target: where tokens went last, (B, N); None while nothing was chosen.
        slot: where those went that the stage began with, (B, N) int32, through all reductions;
            None while nothing was chosen, and where none come back.
        waiting: all tokens as they were when some of them began to wait; None if none do.
        memory: what the method remembers; all stages share it.
    """

    size: Tensor | None = None
    place: Tensor | None = None
    target: Tensor | None = None
    slot: Tensor | None = None
    waiting: Tensor | None = None
    memory: Tensor | None = None


def _check_method(method: Method, plan: Plan, family: Family, output: str | None) -> None:
    """Refuse a method where it cannot do what is asked for."""
    if not plan.removed_total:
        return  # it is asked for nothing
    missing = sorted(set(method.needs) - set(family.signals))
    if missing:
        raise RewriteError(
            f"{method.name} needs {', '.join(missing)}, which the family "
            f"{family.name!r} does not give; it gives {', '.join(family.signals)}."
        )
    if "class_attention" in method.needs and not plan.n_prefix:
        raise RewriteError(
            f"{method.name} ranks tokens by what the class token attends to, and {plan.model} "
            "has none; take a method that compares tokens, like tome."
        )
    dropped = method.drops or any(step.pruned for step in plan.steps)
    if dropped and output == TOKENS:
        raise RewriteError(
            f"{method.name} drops tokens here, so that the patches they stood for have no "
            "feature left to put out. Take a method that merges them, like tome, or in which "
            "they come back, like evo-vit."
        )
    if dropped and plan.staged:
        raise RewriteError(
            f"{method.name} drops tokens, and {plan.model} needs all of them again between its "
            "stages. Take a method that merges them, like tome or dtps."
        )
    if method.remember and plan.steps[0].removed:
        raise PlanError(
            f"{method.name} chooses by what earlier blocks attended to, and there is none "
            f"before {plan.steps[0].block}. Start at a later one, as in keep:0.5@4,8."
        )


def _places(left: Reduced, place: Tensor | None, step: Step) -> Tensor:
    """Return where each slot is from, (B, M): from where the token is that leads it."""
    n, n_left = step.tokens_in, step.tokens_out
    if left.target is None:
        leader = torch.arange(n_left).expand(left.x.shape[0], -1)
    else:
        # the first of the tokens that lead, or the first of all
        priority = torch.arange(n, 0, -1)
        if left.leads is not None:
            priority = priority + n * left.leads
        slots = torch.arange(n_left, dtype=torch.int32)[:, None]
        inside = left.target.int()[:, None, :] == slots  # (B, M, N); int32 as in `_slots`
        leader = (inside * priority.expand(left.target.shape)[:, None, :]).argmax(dim=2)
    return leader if place is None else place.gather(1, leader)


def _slots(target: Tensor, slot: Tensor | None) -> Tensor:
    """Return where the tokens of the stage's start are, (B, N), after another reduction."""
    # as int32: OpenVINO has no int64, and does not convert what operators of ours give
    return target.int() if slot is None else entries(target.int(), slot)


def _restored(x: Tensor, state: _Stage, n: int) -> Tensor:
    """Give each of n tokens, (B, N, C), what the slot holds that it went to, (B, M, C).

    Those that waited are as they were.
    """
    slot = state.slot
    if state.waiting is None or slot is None:
        return at_places(x, slot, n)
    back = at_places(x, slot.clamp(min=0), n)
    return torch.where(slot[:, :, None] < 0, state.waiting, back)


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
