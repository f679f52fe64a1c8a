"""A method's own weights: taken from the checkpoint, or seeded beside seeded weights of a model."""

from __future__ import annotations

import torch
from torch import nn

from tomexport.errors import CheckpointError
from tomexport.exporter.architecture import problems
from tomexport.exporter.families import family_of
from tomexport.exporter.methods.method import Method, Own
from tomexport.exporter.source import Source
from tomexport.exporter.weights import seed_weights
from tomexport.plan import Plan


def own_weights(method: Method, plan: Plan, found: Source) -> tuple[nn.Module | None, ...]:
    """Return a method's own modules with their weights, one per site; None where it has none.

    Raises: CheckpointError if the file does not hold them, or not in the right shape.
    """
    if method.weights is None:
        return (None,) * len(plan.steps)
    sites = family_of(found.model).cost(found.model, found.name).sites
    with torch.device("meta"):
        own = method.weights(sites, plan.steps, found.extras)
    return tuple(each and _filled(each, index, method, found) for index, each in enumerate(own))


def _filled(own: Own, index: int, method: Method, found: Source) -> nn.Module:
    if found.seed is not None:
        return seed_weights(own.module.to_empty(device="cpu"), found.seed + index + 1).eval()
    if not found.extras:
        raise CheckpointError(
            f"{method.name} has weights of its own ({own.name}), and {found.weights} holds none. "
            f"Give a checkpoint that was trained with {method.name}, or for a trial a name and "
            "--random-weights 0."
        )
    start = f"{own.name}."
    state = {k.removeprefix(start): t for k, t in found.extras.items() if k.startswith(start)}
    if wrong := problems(own.module, state):
        raise CheckpointError(
            f"{found.weights} does not hold {own.name} as {method.name} needs it: {wrong}. Take "
            f"the checkpoint that training with {method.name} left."
        )
    own.module.load_state_dict(state, assign=True)
    return own.module.eval()
