"""How our own networks join timm's registry, so that there is one table of names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn

from tomexport.errors import CheckpointError

Variant = TypeVar("Variant")
# what timm passes to every model, and concerns weights that it would load or draw
_OPTIONS_OF_TIMM = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "weight_init"}


def register(
    timm: Any,
    module: str,
    network: Callable[..., nn.Module],
    variants: Mapping[str, Variant],
    configuration: Callable[[Variant], dict[str, Any]],
) -> None:
    """Add the variants of a network to timm's registry.

    Args:
        timm: the package.
        module: the name of the network's module.
        network: (variant, **options) → model.
        variants: by name.
        configuration: what a variant was trained on, as timm says it: input_size (channels, height,
            width), and mean and std where they are not timm's own.
    """
    configurations = {name: configuration(variant) for name, variant in variants.items()}
    vars(sys.modules[module])["default_cfgs"] = timm.models.generate_default_cfgs(configurations)
    for name, variant in variants.items():
        timm.models.register_model(_entrypoint(name, module, partial(network, variant)))


def _entrypoint(name: str, module: str, network: Callable[..., nn.Module]) -> Callable[..., Any]:
    """Make the function that timm's registry holds for a name."""

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise CheckpointError(
                f"The authors' weights of {name} lie on no hub that timm can reach; download "
                "them from the page of their repository and load the file."
            )
        model = network(**{k: v for k, v in options.items() if k not in _OPTIONS_OF_TIMM})
        model.pretrained_cfg = {"architecture": name}  # type: ignore[assignment]
        return model

    build.__name__, build.__module__ = name, module
    return build
