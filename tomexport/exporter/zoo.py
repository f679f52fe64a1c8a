"""timm: imported safely, asked for names, architectures and pretrained weights."""

from __future__ import annotations

import socket
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from torch import nn

from tomexport.errors import CheckpointError, RewriteError, UnknownNameError, did_you_mean, need
from tomexport.exporter.models import MODELS

# Operators that torchvision's Python registers shape rules for, whether or not its compiled half
# could be loaded. PyPI's torchvision is built for CUDA; beside a CPU build of torch it cannot.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept_alive: list[Any] = []
# modules whose models can be told to; the others would take it for an unknown argument
_SKIP_INITIALISATION = (
    "vision_transformer", "deit", "vision_transformer_hybrid", "vision_transformer_relpos",
)  # fmt: skip


@lru_cache(maxsize=1)
def timm() -> ModuleType:
    """Import timm with our own models in its registry, also where torchvision is PyPI's.

    Raises: MissingExtraError if timm is not installed.
    """
    try:
        need("torchvision", "export")
    except RuntimeError as err:
        if "torchvision::nms does not exist" not in str(err):
            raise
        _declare_torchvision_operators()
    package = need("timm", "export")
    for model in MODELS:
        model.register(package)
    return package


def _declare_torchvision_operators() -> None:
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    _kept_alive.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


@lru_cache(maxsize=8)
def supported_names(modules: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Return the names of some modules, or of all modules that a family covers."""
    from tomexport.exporter.families import FAMILIES

    chosen = [module for family in FAMILIES for module in family.modules]
    return tuple(name for m in modules or chosen for name in timm().list_models(module=m))


def check_name(name: str) -> str:
    """Return the architecture of a timm name, without its pretrained tag.

    Raises: RewriteError for a timm model of another kind, UnknownNameError for no timm model.
    """
    architecture, dot, tag = name.partition(".")
    known = timm().list_models()
    if architecture not in known:
        # a name that leaves something out, like swin_tiny, is refused for what it is
        relatives = [entry for entry in known if entry.startswith(f"{architecture}_")]
        if relatives and not set(relatives) & set(supported_names()):
            raise RewriteError(_not_reduced(relatives[0]))
        near = did_you_mean(architecture, supported_names()) or did_you_mean(architecture, known)
        raise UnknownNameError(
            f"Unknown model {name!r}: neither a file nor a timm name.{near} "
            "A file ends in .pth, .pt, .bin or .safetensors."
        )
    if architecture not in supported_names():
        raise RewriteError(_not_reduced(architecture))
    tags = [full.partition(".")[2] for full in timm().list_pretrained(f"{architecture}.*")]
    if dot and tag not in tags:
        raise UnknownNameError(
            f"{architecture} has no pretrained tag {tag!r}; known: {', '.join(sorted(tags))}."
            f"{did_you_mean(tag, tags)}"
        )
    return architecture


def _not_reduced(architecture: str) -> str:
    from tomexport.exporter.families import FAMILIES

    module = module_of(architecture)
    modules = ", ".join(module for family in FAMILIES for module in family.modules)
    return (
        f"{architecture} is of timm's module {module!r}, which tomexport does not reduce: no "
        "family here knows that its blocks keep one sequence of tokens from start to end, as "
        f"merging needs. Models of these modules can be reduced: {modules}."
    )


def skeleton(architecture: str, **options: Any) -> nn.Module:
    """Build an architecture without memory for its weights (on the meta device)."""
    if module_of(architecture) in _SKIP_INITIALISATION:
        options["weight_init"] = "skip"
    with torch.device("meta"):
        model: nn.Module = timm().create_model(architecture, **options)
    return model.eval()


def module_of(architecture: str) -> str:
    """Return the module that timm's registry has a name from."""
    return str(timm().model_entrypoint(architecture).__module__.rsplit(".", 1)[-1])


def blocks_only(architecture: str, depth: int) -> dict[str, Any]:
    """Return the options that build an architecture with fewer blocks."""
    options: dict[str, Any] = {"depth": depth}
    if architecture.endswith("_sapiens2"):  # lists them by block; 0 is one for each head
        options["num_kv_heads"] = 0
    return options


def fill_buffers(model: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds, in a skeleton that got its weights.

    Raises: RewriteError if a module does not say how its buffers are computed.
    """
    module: Any
    for module in model.modules():
        buffers = module.named_buffers(recurse=False)
        absent = {name: tensor for name, tensor in buffers if tensor.is_meta}
        for name, tensor in absent.items():
            module._buffers[name] = torch.empty_like(tensor, device="cpu")
        if absent and not hasattr(module, "init_non_persistent_buffers"):
            raise RewriteError(
                f"{type(module).__name__} has buffers that its checkpoint lacks "
                f"({', '.join(absent)}), and does not say how they are computed. Build the model "
                "in Python and pass it."
            )
        if absent:
            module.init_non_persistent_buffers()


def pretrained(name: str) -> nn.Module:
    """Build a timm name with its pretrained weights, from the cache or the hub.

    Raises: CheckpointError if the weights cannot be had, with the ways to go on.
    """
    check_name(name)
    ways = (
        "Pass a checkpoint file instead of the name, with --arch "
        f"{name.partition('.')[0]}, or use --random-weights 0 for a trial."
    )
    configuration = timm().get_pretrained_cfg(name)
    if configuration is None or not configuration.has_weights:
        raise CheckpointError(f"timm has no pretrained weights for {name}. {ways}")
    if not _is_cached(configuration.hf_hub_id) and (reason := _hub_unreachable()):
        raise CheckpointError(
            f"The pretrained weights of {name} are out of reach: {reason}. {ways}"
        )
    try:
        model: nn.Module = timm().create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as err:
        raise CheckpointError(
            f"The pretrained weights of {name} could not be loaded: {err}. {ways}"
        ) from err
    return model.eval()


def _is_cached(hub_id: str | None) -> bool:
    hub = need("huggingface_hub", "export")
    files = ("model.safetensors", "pytorch_model.bin")
    return bool(hub_id) and any(
        isinstance(hub.try_to_load_from_cache(hub_id, file), str) for file in files
    )


def _hub_unreachable() -> str | None:
    """Return why the hub cannot be reached, in a moment instead of after minutes of retries."""
    hub = urlparse(need("huggingface_hub", "export").constants.ENDPOINT)
    proxy = getproxies().get(hub.scheme)  # resolves names for us, so it is what must answer
    first = urlparse(proxy if "://" in proxy else f"http://{proxy}") if proxy else hub
    try:
        port = first.port or {"https": 443}.get(first.scheme, 80)
        socket.create_connection((first.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as err:
        return f"{first.hostname} does not answer ({getattr(err, 'strerror', None) or err})"
    return None


def preprocessing(name: str) -> dict[str, Any] | None:
    """Return how timm prepares images for a name; sizes in pixels, mean and std per channel."""
    configuration = timm().get_pretrained_cfg(name)
    if configuration is None:
        return None
    _, height, width = configuration.input_size
    return {
        "size": [height, width],
        "crop_pct": configuration.crop_pct,
        "crop_mode": configuration.crop_mode,
        "interpolation": configuration.interpolation,
        "mean": list(configuration.mean),
        "std": list(configuration.std),
    }
