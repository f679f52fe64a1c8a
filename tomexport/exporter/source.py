"""A model and where it is from: a checkpoint file, a timm name, or a module as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tomexport.artifact import IN_MEMORY, PRETRAINED
from tomexport.artifact import RANDOM as RANDOM
from tomexport.errors import RewriteError
from tomexport.exporter import checkpoint, zoo
from tomexport.exporter.architecture import build, own_of
from tomexport.exporter.families import family_of
from tomexport.exporter.rewrite import private_copy
from tomexport.exporter.weights import seed_weights, weights_sha256


@dataclass(frozen=True)
class Source:
    """A model and where it is from.

    Attributes:
        model: the original module, in evaluation mode.
        names: timm names that it could be; empty for a module of the user's own.
        weights: where the weights are from, in words.
        preprocessing: how images are prepared, or None if it is not known.
        notes: what the user should know of how it was found.
        extras: weights in the file that are some method's own, not the model's.
        methods: the methods that have such weights.
        seed: what the weights were drawn from, if they are not trained ones.
    """

    model: nn.Module
    names: tuple[str, ...]
    weights: str
    preprocessing: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.names[0] if self.names else type(self.model).__name__

    @property
    def sha256(self) -> str:
        """The hash of all weights, a method's own among them."""
        return weights_sha256(self.model, self.extras)


def find(
    model: str | Path | nn.Module | Source,
    *,
    arch: str | None = None,
    img_size: tuple[int, int] | None = None,
    random_weights: int | None = None,
    permutation_seed: int | None = None,
    with_weights: bool = True,
) -> Source:
    """Find a model.

    Args:
        model: path, name or module, or what was found before, which stays as it is.
        arch: timm name of a checkpoint's architecture; None finds it.
        img_size: (height, width) in pixels to resample the positions for.
        random_weights: seed for weights instead of trained ones.
        permutation_seed: seed for the orders in which a model's attention takes its tokens; None
            leaves it as the model has it.
        with_weights: False builds a name without its weights.

    Raises: CheckpointError, RewriteError, UnknownNameError or MissingExtraError.
    """
    if isinstance(model, Source):
        if arch or img_size or (random_weights, permutation_seed) != (None, None):
            raise RewriteError("This model was found already; say how where it is found.")
        return model
    if isinstance(model, nn.Module):
        if arch or random_weights is not None:
            raise RewriteError("arch and random_weights go with a file or a name, not a module.")
        found = _from_module(model)
    elif checkpoint.looks_like_file(str(model)):
        found = _from_file(Path(model), arch, random_weights)
    else:
        found = _from_name(str(model), arch, random_weights, with_weights)
    if permutation_seed is not None:
        found = _permute(found, permutation_seed)
    return _resize(found, img_size) if img_size else found


def _from_module(model: nn.Module) -> Source:
    """Take a module as it is; timm's say what they were built as.

    Modules that are a method's own, of the names that its checkpoints have, are taken off a copy.
    """
    extras, methods = own_of(model.state_dict())
    if extras:
        model = private_copy(model)
        for own in dict.fromkeys(key.rpartition(".")[0] for key in extras):
            parent, _, child = own.rpartition(".")
            delattr(model.get_submodule(parent), child)
    configuration = getattr(model, "pretrained_cfg", None) or {}
    name = configuration.get("architecture")
    if name not in zoo.supported_names():
        return Source(model, (), IN_MEMORY, None, (), extras, methods)
    return Source(model, (name,), IN_MEMORY, zoo.preprocessing(name), (), extras, methods)


def _from_file(path: Path, arch: str | None, seed: int | None) -> Source:
    checkpoint.check_file(path)
    if seed is not None:
        raise RewriteError(
            f"{path} is a file with weights of its own; --random-weights goes with a name."
        )
    built = build(checkpoint.load_checkpoint(path), arch)
    return Source(
        built.model, built.names, path.name, built.preprocessing, built.notes,
        built.extras, built.methods,
    )  # fmt: skip


def _from_name(name: str, arch: str | None, seed: int | None, with_weights: bool) -> Source:
    if arch and arch != name:
        raise RewriteError(f"--arch {arch} goes with a checkpoint file; {name!r} is a name itself.")
    zoo.check_name(name)
    if seed is not None:
        _require_seed("--random-weights", seed)
        model = seed_weights(zoo.timm().create_model(name), seed).eval()
        weights = f"{RANDOM} {seed}"
    elif with_weights:
        model, weights = zoo.pretrained(name), PRETRAINED
    else:
        model, weights = zoo.skeleton(name), "none"
    return Source(model, (name,), weights, zoo.preprocessing(name), seed=seed)


def _permute(found: Source, seed: int) -> Source:
    if getattr(found.model, "permutation_seed", None) is None:
        raise RewriteError(
            f"{found.name} takes its tokens in their own order, so there is nothing for "
            "--permutation-seed to change; leave it out. It goes with SReT that slices twice."
        )
    _require_seed("--permutation-seed", seed)
    model = private_copy(found.model)
    model.permutation_seed = seed
    return dataclasses.replace(found, model=model)


def _require_seed(option: str, seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise RewriteError(f"{option} {seed} is no seed: it has more than 64 bits.")


def _resize(found: Source, img_size: tuple[int, int]) -> Source:
    """Resample the positions of a model for another image size."""
    family = family_of(found.model)
    old = family.input_shape(found.model)[1:]
    if img_size == old:
        return found
    model = private_copy(found.model)
    patch = family.grain(model)
    near = tuple(max(1, round(s / p)) * p for s, p in zip(img_size, patch, strict=True))
    if near != img_size:
        raise RewriteError(
            f"An image of {img_size[0]}×{img_size[1]} does not divide into patches of "
            f"{patch[0]}×{patch[1]}; the nearest that does is {near[0]}×{near[1]}."
        )
    family.resize(model, img_size)
    note = f"positions resampled from {old[0]}×{old[1]} to {img_size[0]}×{img_size[1]} pixels"
    return dataclasses.replace(found, model=model, notes=(*found.notes, note))
