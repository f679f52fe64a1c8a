"""Safe loading: a file's tensors and what it says of itself, and nothing in it runs."""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tomexport.errors import CheckpointError, need, plain

# .pth.tar is written by timm, .torch by SWAG's authors, .npz by those of ViT
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".torch", ".npz")

_multiarray = importlib.import_module("numpy._core.multiarray")

# where training code keeps the weights, the ones to prefer first
_WRAPPERS = ("model", "state_dict", "module", "model_state_dict", "net", "ema", "model_ema",
             "state_dict_ema")  # fmt: skip
# what model hubs call a file whose config.json names an architecture
_HUB_STEMS = ("model", "pytorch_model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# plain containers of numbers that training files hold beside the weights
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    OrderedDict,
    defaultdict,
    *(list, dict, int, float),  # what a defaultdict makes
    PosixPath,
    _multiarray.scalar,
    _multiarray._reconstruct,
    (_multiarray.scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 called them
    (_multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(
        type(np.dtype(kind))
        for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
    ),
]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        source: the file's name, for messages.
        state: name → tensor; wrappers and prefixes are taken off, floats are float32.
        architecture: the name that the file gives itself, if it does.
        notes: what the user should know of how it was read.
        config, preprocessor: what config.json and preprocessor_config.json beside the file hold, as
            model hubs lay them out; empty if there are none.
    """

    source: str
    state: dict[str, Tensor]
    architecture: str | None
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)


def looks_like_file(model: str) -> bool:
    """Tell a checkpoint's path from a model's name."""
    path = Path(model)
    is_path = path.suffix.lower() in SUFFIXES or path.exists() or "/" in model or "\\" in model
    return is_path and bool(model.strip())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running anything that it holds.

    Raises: CheckpointError if there is no such file, it is no checkpoint, it wants to run code,
        or it holds NaN or infinite weights.
    """
    check_file(path)
    if path.suffix.lower() == ".safetensors":
        content, metadata = _read_safetensors(path)
    elif path.suffix.lower() == ".npz":
        content, metadata = _read_npz(path), {}
    else:
        content, metadata = _read_pickle(path), {}
    state, notes = _find_state(content, path)
    state = _without_prefixes(state)
    config = _beside(path, "config.json")
    hub = config if path.stem in _HUB_STEMS else {}
    architecture = next(filter(None, map(_architecture, (content, metadata, hub))), None)
    return Checkpoint(
        path.name, _checked(state, path), architecture, tuple(notes), config,
        _beside(path, "preprocessor_config.json"),
    )  # fmt: skip


def check_file(path: Path) -> None:
    """Refuse what cannot be a checkpoint, from the outside.

    Raises: CheckpointError if there is no such file, or it is a folder, empty, or of another kind.
    """
    if not path.exists():
        raise CheckpointError(f"There is no file {path}. Check the path, or give a timm name.")
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; give the checkpoint inside it ({', '.join(SUFFIXES)})."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(
            f"{path.name} is no checkpoint by its suffix {path.suffix!r}; known: "
            f"{', '.join(SUFFIXES)}."
        )
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); copy or download it again.")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith((b"<", b"version https://git-lfs")):
        what = "a web page" if start.startswith(b"<") else "the pointer of a Git LFS file"
        raise CheckpointError(f"{path} is {what}, not the checkpoint itself; download it again.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safetensors = need("safetensors", "export")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as err:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({plain(err)}); it may be cut off. "
            "Copy or download it again."
        ) from err


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise CheckpointError(
            f"{path} is not a readable .npz of plain numbers ({plain(err)}); it may be cut off. "
            "Copy or download it again."
        ) from err


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(err))
        what = (
            f"wants to run {wanted[1]} while it loads" if wanted else "is more than plain weights"
        )
        raise CheckpointError(
            f"{path} {what}, so it was refused and nothing in it ran. Save the weights alone, "
            "where the file was made: torch.save(model.state_dict(), path)"
        ) from err
    except Exception as err:
        raise CheckpointError(
            f"{path} is not a readable PyTorch checkpoint ({plain(err)}); it may be cut off or of "
            "another kind. Copy or download it again."
        ) from err


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and sum(isinstance(tensor, Tensor) for tensor in value.values()) * 2 > len(value)
    )


def _find_state(content: Any, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Find the weights in a training file; at most two wrappers deep."""
    if _is_state(content):
        return dict(content), []
    wrappers: dict[str, Any] = {}
    if isinstance(content, Mapping):
        for name in _WRAPPERS:
            inner = content.get(name)
            if isinstance(inner, Mapping) and not _is_state(inner):
                inner = next((inner[key] for key in _WRAPPERS if _is_state(inner.get(key))), None)
            if _is_state(inner):
                wrappers[name] = inner
    if not wrappers:
        keys = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path} holds no state dict: found {keys}. The weights should be the file itself or "
            f"under one of: {', '.join(_WRAPPERS)}."
        )
    chosen, *others = wrappers
    notes = []
    if others:
        notes.append(
            f"the weights are those under {chosen!r}; the file also has {', '.join(others)}"
        )
    return dict(wrappers[chosen]), notes


def _without_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    """Take off the prefixes that wrappers of the module left on every key."""
    for prefix in _PREFIXES:
        stripped = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        if stripped.keys() != state.keys() and all(_counts_as(name, prefix) for name in state):
            return _without_prefixes(stripped)
    return state


def _counts_as(key: str, prefix: str) -> bool:
    return key.startswith(prefix) or key == "n_averaged"  # torch's averaged models count beside


def _has_plain_values(tensor: Tensor) -> bool:
    odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex()
    return not (odd or tensor.is_meta)


def _checked(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    bad = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if bad:
        raise CheckpointError(
            f"{path}: {bad[0]!r} is no tensor but a {type(state[bad[0]]).__name__}, so this is "
            "not a state dict. Save the weights alone: torch.save(model.state_dict(), path)"
        )
    odd = [n for n, t in state.items() if not _has_plain_values(t)]
    if odd:
        raise CheckpointError(
            f"{path}: {odd[0]!r} is sparse, quantized, complex or without values; save the model's "
            "float weights."
        )
    floats = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    broken = [n for n, t in floats.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        count = int((~floats[broken[0]].isfinite()).sum())
        raise CheckpointError(
            f"{path}: {len(broken)} tensor{'s hold' if len(broken) > 1 else ' holds'} NaN or "
            f"infinite values, first {broken[0]!r} "
            f"({count} of {floats[broken[0]].numel()}). The training diverged or the file is "
            "damaged; take an earlier checkpoint."
        )
    return floats


def _architecture(content: Any) -> str | None:
    """Return the architecture that a training file names: `arch`, or its arguments' `model`."""
    if not isinstance(content, Mapping):
        return None
    arguments = content.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    named = [content.get("arch"), content.get("architecture")]
    if isinstance(arguments, Mapping):
        named += [arguments.get("model"), arguments.get("arch")]
    return next((name for name in named if isinstance(name, str) and name), None)


def _beside(path: Path, name: str) -> Mapping[str, Any]:
    """Return what a JSON file beside the checkpoint holds, as model hubs lay it out."""
    try:
        content = json.loads((path.parent / name).read_text())
    except (OSError, ValueError, RecursionError):
        return {}  # none, or another program's file
    return content if isinstance(content, Mapping) else {}
