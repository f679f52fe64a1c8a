"""What a reduction method is: where it stands, how many it can remove, what it looks at, its rule.

Every method says for each of N tokens which of M slots it goes to, and with what weight. Most do it
by a `Choice`, which one shared operator carries out; where choosing and reducing are fused in one
kernel, the method calls that operator itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tomexport.errors import require_known
from tomexport.exporter.families.family import Signals
from tomexport.kernels.operators import REDUCE
from tomexport.plan import Counting, Site, Step

Margin = Callable[[], Tensor]


class View(NamedTuple):
    """What a method sees at a site.

    Attributes:
        x: (B, N, C), the tokens: between attention and MLP, or before the block.
        before: (B, N, C), what the block was given.
        size: (B, N, 1) or (1, N, 1), how many original tokens each stands for.
        signals: what the block's attention saw; None before a block.
        step: the counts.
        n_prefix: tokens at the front that stay.
        raster: whether slots must stand where their first tokens stood.
        weights: the method's own, of this site; None for methods without.
        call, n_calls: which block call this is, from 0, and how many there are.
        memory: what the method remembers of the blocks before; None of methods that do not, and
            before the first block.
    """

    x: Tensor
    before: Tensor
    size: Tensor
    signals: Signals | None
    step: Step
    n_prefix: int
    raster: bool = False
    weights: nn.Module | None = None
    call: int = 0
    n_calls: int = 1
    memory: Tensor | None = None

    @property
    def attended(self) -> Signals:
        """The signals, of a method that stands after the attention."""
        assert self.signals is not None
        return self.signals


class Reduced(NamedTuple):
    """What a reduction leaves.

    Attributes:
        x: (B, M, C).
        size: (B, M, 1) or (1, M, 1).
        target: (B, N) slot of each token, −1 for none; None if nothing was chosen.
        margin: () → (B,) how far the nearest other decision was, in units of the method's score;
            None if all images are decided alike.
        leads: (N,) or (B, N) bool, the tokens that give their slots a place; the first of a slot
            does where none does, and None is none anywhere.
    """

    x: Tensor
    size: Tensor
    target: Tensor | None
    margin: Margin | None
    leads: Tensor | None = None


class Choice(NamedTuple):
    """Where tokens go: x_j = Σ weight·x / (Σ weight if mean else 1), size_j = Σ share·size.

    Attributes:
        target: (B, N) int64 slot of each token, −1 for none.
        weight: (B, N) or (1, N) of each token in its slot.
        mean: whether weights are relative.
        margin, leads: as in `Reduced`.
        share: (B, N) or (1, N), how much of a token's size its slot gets; None is all.
    """

    target: Tensor
    weight: Tensor
    mean: bool
    margin: Margin | None
    leads: Tensor | None = None
    share: Tensor | None = None


class Own(NamedTuple):
    """Weights of a method's own, at one site.

    Attributes:
        name: what their keys begin with in a checkpoint: "score_predictor.0".
        module: what they are loaded into; its values do not matter.
    """

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Method:
    """A way to reduce tokens.

    Attributes:
        name: as on the command line.
        needs: the signals it looks at.
        counting: how a schedule becomes counts, and where in a block tokens are removed.
        reduce: carries it out at a site.
        sizes: whether slots have sizes, by which pooling weighs them; methods that drop tokens, or
            that were trained without, have none.
        weighs_keys: whether attention, too, weighs by the sizes, unless the user turns it off.
        drops: whether some tokens go nowhere, so that nothing is there for them to come back to.
        options: what can be chosen, and the values of each, the default first.
        configure: (**chosen) → the method with other options than the defaults.
        weights: (sites, steps, weights in the file that are a method's) → the method's own, one per
            site, None where it has none; made without values (on the meta device). None for a
            method without weights.
        fitted: (weights in the file that are a method's) → the method as the file has it; None if
            it is the same with any.
        remember: (memory or None, signals of a block, where its tokens are) → the memory after that
            block, which `View.memory` shows to the next reduction. Where tokens are is the target
            map (B, N) of the last reduction, −1 for those that wait; None while all are there.
        asked: (view) → (B,) tokens that the paper's method would leave of each image, where that
            depends on the image; None where it does not.
    """

    name: str
    needs: tuple[str, ...]
    counting: Counting
    reduce: Callable[[View], Reduced]
    sizes: bool = True
    drops: bool = False
    weighs_keys: bool = True
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    configure: Callable[..., Method] | None = None
    weights: (
        Callable[[Sequence[Site], Sequence[Step], Mapping[str, Tensor]], Sequence[Own | None]]
        | None
    ) = None
    fitted: Callable[[Mapping[str, Tensor]], Method] | None = None
    remember: Callable[[Tensor | None, Signals, Tensor | None], Tensor] | None = None
    asked: Callable[[View], Tensor] | None = None

    def configured(self, chosen: Mapping[str, str]) -> Method:
        """Return the method with options; its name says those that are not the defaults.

        Raises: UnknownNameError for an option or value that it does not have.
        """
        for option, value in chosen.items():
            require_known(f"option of {self.name}", option, self.options)
            require_known(f"{option} of {self.name}", value, self.options[option])
        other = {k: v for k, v in sorted(chosen.items()) if v != self.options[k][0]}
        if not other or self.configure is None:
            return self
        said = ",".join(f"{option}={value}" for option, value in other.items())
        return dataclasses.replace(self.configure(**other), name=f"{self.name}:{said}")


def by_choice(choose: Callable[[View], Choice]) -> Callable[[View], Reduced]:
    """Return the reduction that carries out a choice with the shared operator.

    `choose` is traced for export: it must be of operations that leave static shapes, and break
    ties by index (see `selection.py`).
    """
    return lambda view: carry_out(view, choose(view))


def carry_out(view: View, choice: Choice) -> Reduced:
    """Send tokens where they are chosen to go, with the shared operator."""
    n_batch, n, _ = view.x.shape
    target = in_raster_order(choice.target) if view.raster else choice.target
    mass = view.size if choice.share is None else view.size * choice.share[:, :, None]
    weight = choice.weight.expand(n_batch, n)[:, :, None]
    x, size = REDUCE(
        view.x, mass.expand(n_batch, n, 1), target, weight,
        r=view.step.removed, mean=int(choice.mean), fixed=int(choice.margin is None),
    )  # fmt: skip
    return Reduced(x, size, target, choice.margin, choice.leads)


def in_raster_order(target: Tensor) -> Tensor:
    """Number slots by the first token of each, (B, N); traced for export, −1 stays −1."""
    together = target[:, :, None] == target[:, None, :]  # (B, N, N)
    leader = together.int().argmax(dim=2)  # the first token of each token's slot
    leads = (leader == torch.arange(target.shape[1])) & (target >= 0)
    number = leads.long().cumsum(dim=1) - 1
    return torch.where(target >= 0, number.gather(1, leader), target)
