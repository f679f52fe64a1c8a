"""The authors' files of AST, whose backbone is one of DeiT's, its classifiers unread."""

from __future__ import annotations

from torch import Tensor

from tomexport.exporter.layouts.layout import Layout, Names, Options, State, n_classes, renamed
from tomexport.exporter.models.ast import VARIANTS

_NAMES: Names = (
    (r"v\.(head.*)", r"unread.\1"),
    (r"v\.(.+)", r"\1"),
    (r"mlp_head\.0\.(.+)", r"fc_norm.\1"),
    (r"mlp_head\.1\.(.+)", r"head.\1"),
)


def _recognises(state: State) -> bool:
    return "v.patch_embed.proj.weight" in state and "v.dist_token" in state


def _rename(state: State, source: str) -> dict[str, Tensor]:
    del source
    return {renamed(key, _NAMES): tensor for key, tensor in state.items()}


def _width(state: State) -> int:
    token = state.get("cls_token")
    return token.shape[-1] if token is not None and token.ndim else 0


def _may_fit(name: str, state: State) -> bool:
    return VARIANTS[name].width == _width(state)


def _options(name: str, state: State, source: str) -> Options:
    del name, source
    return {"num_classes": n_classes(state)}


def _describe(state: State) -> str:
    return f"AST of width {_width(state)}"


AST = Layout(
    name="AST",
    modules=("ast",),
    recognises=_recognises,
    rename=_rename,
    spare=((r"unread\..+", "the backbone's own classifiers"),),
    may_fit=_may_fit,
    options=_options,
    describe=_describe,
)
