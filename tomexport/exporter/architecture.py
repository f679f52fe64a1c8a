"""State dict → model: named, or found by the shapes of the weights.

timm names that compute the same function from the same weights count as one. Names that fit the
weights but compute different functions (other heads, another activation, another epsilon) are
refused until the user names one: the tensors cannot tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tomexport.errors import CheckpointError, RewriteError, TomexportError
from tomexport.exporter.checkpoint import Checkpoint
from tomexport.exporter.layouts import LAYOUTS
from tomexport.exporter.layouts.layout import Layout, Options
from tomexport.exporter.zoo import (
    check_name,
    fill_buffers,
    preprocessing,
    skeleton,
    supported_names,
)

# module types that do nothing in evaluation, so that their presence makes no difference
_INERT = ("Dropout", "DropPath", "Identity", "PatchDropout")
_SETTINGS_OF_TRAINING = {"training", "grad_checkpointing", "distilled_training", "fused_attn",
                         "weight_init_mode", "fix_init", "grad_checkpointing_kwargs"}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A model made from a checkpoint.

    Attributes:
        model: the original module with the weights in it, in evaluation mode.
        names: the names that it could be; all compute the same.
        preprocessing: how images are prepared, or None if the names differ in it.
        notes: what the user should know of how it was found.
        extras: weights that are some method's own, not the model's.
        methods: the methods that such a file can be of.
    """

    model: nn.Module
    names: tuple[str, ...]
    preprocessing: dict[str, Any] | None
    notes: tuple[str, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    methods: tuple[str, ...] = ()


def build(checkpoint: Checkpoint, arch: str | None = None) -> Built:
    """Build the model that a checkpoint holds.

    Args:
        checkpoint: the weights.
        arch: a timm name; without it the checkpoint's own word or the shapes decide.

    Raises: CheckpointError if the weights do not fit, naming the keys, or fit several functions.
    """
    layout = _layout(checkpoint, arch)
    state = layout.rename(checkpoint.state, checkpoint.source)
    state, notes = _without_spare(state, layout)
    state, extras, methods = _without_extras(state, layout)
    if extras:
        notes.append(f"holds weights of {' or '.join(methods)}: {_first(list(extras))}")
    if layout.methods:
        notes.append(f"trained with {' or '.join(layout.methods)}, as its keys say")
    own = checkpoint.architecture
    name = arch or (layout.called(own) if own else None)
    if name and not arch:
        try:
            check_name(name)
        except TomexportError:
            notes.append(f"the file calls itself {own!r}, no supported timm name: found by shapes")
            name = None
    notes = [*checkpoint.notes, *notes]
    said, words = _said(layout, state, checkpoint, name)
    notes += words
    if name:
        _require_kin(name, layout, checkpoint.source)
        options = layout.options(name, state, checkpoint.source) | said
        model = skeleton(name, **options)
        _require_fit(model, state, checkpoint.source, name, named_by_file=not arch)
        names: tuple[str, ...] = (name,)
        if not arch:
            notes.append(f"architecture {name}, as the file says")
    else:
        names, options = _infer(state, layout, checkpoint.source, said)
        model = skeleton(names[0], **options)
        notes.append(_fitting_note(names))
    _require_floats(state, model, checkpoint.source)
    model.load_state_dict(state, assign=True)
    fill_buffers(model)
    shared = {str(preprocessing(name)) for name in names}
    known = preprocessing(names[0]) if len(shared) == 1 else None
    if layout.preprocessing and checkpoint.preprocessor:
        known = layout.preprocessing(checkpoint.preprocessor) or known
    return Built(model.eval(), names, known, tuple(notes), extras, layout.methods + methods)


def _require_kin(name: str, layout: Layout, source: str) -> None:
    if check_name(name) not in supported_names(layout.modules):
        raise CheckpointError(
            f"{source} names its weights as {layout.name} does, so it cannot be {name}, which is "
            "a model of another kind. Leave out --arch to have the architecture found by shapes."
        )


def _said(
    layout: Layout, state: Mapping[str, Tensor], checkpoint: Checkpoint, name: str | None
) -> tuple[Options, list[str]]:
    """Return what only the config.json beside the file tells of the model, and a note on it."""
    if layout.said and checkpoint.config:
        said = layout.said(checkpoint.config, state, checkpoint.source)
        return said, [f"{', '.join(_plainly(said))}: as the config.json beside it says"]
    if layout.untold and name is None:
        file = "Put the model's config.json beside it, or name" if layout.said else "Name"
        raise CheckpointError(
            f"{checkpoint.source} names its weights as {layout.name}, and its tensors do not tell "
            f"{layout.untold}. {file} the timm architecture that it is with --arch."
        )
    if layout.said is None:
        return {}, []
    return {}, [f"activation, epsilon and heads are those of {name}; there is no config.json"]


def _plainly(said: Options) -> list[str]:
    """Say options in words."""
    kinds = {"num_heads": "{} heads", "act_layer": "activation {}", "norm_layer": "norms {}"}
    return [kinds[key].format(_word(value)) for key, value in said.items()]


def _word(value: Any) -> str:
    if isinstance(value, partial):
        how = ", ".join(f"{key} {each}" for key, each in value.keywords.items())
        return f"{value.func.__name__} of {how}"
    return getattr(value, "__name__", str(value))


def _require_floats(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    integers = [n for n, _ in model.named_parameters() if not state[n].is_floating_point()]
    if integers:
        raise CheckpointError(
            f"{source}: {_some(integers)} hold {state[integers[0]].dtype}, where weights are "
            "fractions. Quantized weights cannot be reduced; give the float checkpoint."
        )


def _fitting_note(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return f"architecture {names[0]}, found by shapes"
    return (
        f"architecture found by shapes: {' = '.join(names)} compute the same; "
        "name one with --arch to record its preprocessing"
    )


def _layout(checkpoint: Checkpoint, arch: str | None) -> Layout:
    """Return the first layout that recognises a file; or, if it cannot tell, that arch has."""
    name = (arch or "").partition(".")[0]  # without its tag
    found = [layout for layout in LAYOUTS if layout.recognises(checkpoint.state)]
    if found and found[0].untold:
        fitting = [layout for layout in found if name in supported_names(layout.modules)]
        return (fitting or found)[0]
    if found:
        return found[0]
    keys = list(checkpoint.state)
    raise CheckpointError(
        f"{checkpoint.source} does not hold a vision transformer of a known layout: its "
        f"{len(keys)} keys begin with {', '.join(keys[:4])}. Known layouts: "
        f"{', '.join(layout.name for layout in LAYOUTS)}."
    )


def _without_spare(state: dict[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """Leave out the keys that a plain forward pass never reads, and say which."""
    left_out: dict[str, list[str]] = {}
    for key in state:
        why = next((why for pattern, why in layout.spare if re.fullmatch(pattern, key)), None)
        if why:
            left_out.setdefault(why, []).append(key)
    spare = {key for keys in left_out.values() for key in keys}
    parts = [f"{_first(keys)} ({why})" for why, keys in left_out.items()]
    notes = [f"left out: {'; '.join(parts)}"] if parts else []
    return {key: tensor for key, tensor in state.items() if key not in spare}, notes


def _without_extras(
    state: dict[str, Tensor], layout: Layout
) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """Return the model's own weights, those of a method, and the methods that have such."""
    extras: dict[str, Tensor] = {}
    methods: tuple[str, ...] = ()
    for pattern, owners in layout.extras:
        found = {key: tensor for key, tensor in state.items() if re.fullmatch(pattern, key)}
        extras |= found
        methods += owners if found else ()
    return {key: t for key, t in state.items() if key not in extras}, extras, methods


def own_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights of a module that are a method's own, and the methods that have such."""
    for layout in LAYOUTS:
        if layout.recognises(state):
            return _without_extras(dict(state), layout)[1:]
    return {}, ()


def _first(keys: list[str]) -> str:
    return f"{keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}"


def _mismatch(
    model: nn.Module, state: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Return missing keys, unexpected keys, and keys of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    reshaped = [
        f"{name} is {_shape(tuple(state[name].shape))}, expected {_shape(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    return missing, unexpected, reshaped


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _require_fit(
    model: nn.Module, state: Mapping[str, Tensor], source: str, name: str, *, named_by_file: bool
) -> None:
    if wrong := problems(model, state):
        way = "Name the right architecture with --arch, or leave it out to have it found by shapes."
        if named_by_file:
            way = "The file itself names this architecture; name the right one with --arch."
        raise CheckpointError(f"{source} does not fit {name}: {wrong}. {way}")


def problems(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return in words how weights do not fit a module; nothing if they do."""
    kinds = zip(("missing", "unexpected", "of another shape"), _mismatch(model, state), strict=True)
    return "; ".join(
        f"{len(keys)} key{'s' if len(keys) > 1 else ''} {kind}: {_some(keys)}"
        for kind, keys in kinds
        if keys
    )


def _some(keys: list[str], limit: int = 6) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _infer(
    state: Mapping[str, Tensor], layout: Layout, source: str, said: Options
) -> tuple[tuple[str, ...], Options]:
    """Return the names that fit, which all compute the same, and the options of the first."""
    fits: dict[str, tuple[Options, nn.Module]] = {}
    closest: tuple[int, str, nn.Module] | None = None
    for name in supported_names(layout.modules):
        if not layout.may_fit(name, state):
            continue
        try:
            options = layout.options(name, state, source) | said
            model = skeleton(name, **options)
        except (CheckpointError, RewriteError):  # of a size that the name cannot have
            continue
        distance = sum(map(len, _mismatch(model, state)))
        if distance == 0:
            fits[name] = (options, model)
        elif closest is None or distance < closest[0]:
            closest = (distance, name, model)
    if not fits:
        _refuse_unknown(state, layout, source, closest)
    fits = _as_named(fits, said) if said else fits
    # a name at its own image size and pooling describes the file better than one bent to fit
    fits = dict(sorted(fits.items(), key=lambda item: len(item[1][0])))
    functions: dict[Any, list[str]] = {}
    for name, (_, model) in fits.items():
        functions.setdefault(function_of(model), []).append(name)
    if len(functions) > 1:
        groups = "; ".join(" = ".join(names) for names in functions.values())
        raise CheckpointError(
            f"{source} fits {len(functions)} architectures that compute different functions from "
            f"the same shapes: {groups}. Name one with --arch."
        )
    (names,) = functions.values()
    return tuple(names), fits[names[0]][0]


def _as_named(
    fits: dict[str, tuple[Options, nn.Module]], said: Options
) -> dict[str, tuple[Options, nn.Module]]:
    """Return those that are by name what else was said of them, if any is; otherwise all."""
    by_name = {
        name: (options, model)
        for name, (options, model) in fits.items()
        if function_of(skeleton(name, **{k: v for k, v in options.items() if k not in said}))
        == function_of(model)
    }
    return by_name or fits


def _refuse_unknown(
    state: Mapping[str, Tensor],
    layout: Layout,
    source: str,
    closest: tuple[int, str, nn.Module] | None,
) -> NoReturn:
    what = layout.describe(state)
    way = (
        "If it is a known architecture with other arguments, build the model in Python and call "
        "tomexport.export(model, …)."
    )
    if closest is None:
        raise CheckpointError(f"{source} ({what}) fits no supported timm name. {way}")
    _, name, model = closest
    raise CheckpointError(
        f"{source} ({what}) fits no supported timm name. The nearest is {name}, with "
        f"{problems(model, state)}. {way}"
    )


def function_of(model: nn.Module) -> tuple[Any, ...]:
    """Return all that decides what a model computes, apart from its weights."""
    return tuple(
        (name, type(module).__qualname__, _settings(module))
        for name, module in model.named_modules()
        if type(module).__name__ not in _INERT
    )


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    plain_types = (bool, int, float, str, tuple, torch.Size)
    return tuple(
        sorted(
            (key, repr(value))
            for key, value in vars(module).items()
            if isinstance(value, plain_types) and key not in _SETTINGS_OF_TRAINING
        )
    )
