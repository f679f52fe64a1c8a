"""Options that commands share, and what their values are read as."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Batch(click.ParamType[Any]):
    name = "N|dynamic"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        if value == "dynamic":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of images nor 'dynamic'", param, ctx)


class Size(click.ParamType[Any]):
    name = "PIXELS|HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = value.lower().split("x")
        if not re.fullmatch(r"[0-9]{1,5}(x[0-9]{1,5})?", value.lower()) or not all(map(int, parts)):
            self.fail(
                f"{value!r} is no size; write 224, or 224x320 for height and width", param, ctx
            )
        return int(parts[0]), int(parts[-1])


def listed(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Apply options in the order in which --help lists them."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


schedule = click.option(
    "--schedule",
    required=True,
    metavar="S",
    help="Tokens to remove: none, const:R, linear:R, exp:R_INIT,ALPHA or list:R0,R1,…; "
    "or what to keep: keep:SHARE@BLOCK,… or diffrate:FILE.json",
)
_METHOD_OPTIONS = ("fuse", "metric", "similarity", "combine", "partition")
method = listed(
    click.option("--method", metavar="NAME", help=(
        "How tokens are chosen.  [default: the method whose weights MODEL has, or tome]"
    )),
    click.option("--no-fuse", "fuse", flag_value="no", default=None,
                 help="Drop what EViT would fuse into one token."),
    click.option("--metric", metavar="k|q|v|x-before|x-after",
                 help="What ToMe compares tokens by.  [default: k, the keys]"),
    click.option("--similarity", metavar="cosine|euclidean|dot|softmax",
                 help="How ToMe compares them.  [default: cosine]"),
    click.option("--combine", metavar="weighted|mean|max|keep",
                 help="What ToMe makes of tokens that merge.  [default: weighted, by size]"),
    click.option("--partition", metavar="alternating|sequential|random",
                 help="The two sets that ToMe matches.  [default: alternating]"),
)  # fmt: skip
arch = click.option(
    "--arch", metavar="NAME", help="timm name of the checkpoint's architecture; found if left out."
)
img_size = click.option("--img-size", type=Size(), help="Image size to resample the positions for.")
output_kind = click.option(
    "--output", "output_kind", metavar="logits|features|tokens", help=(
        "tokens: a feature of each patch, for dense heads.  [default: what MODEL has]"
    ),
)  # fmt: skip
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
debug = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
)
images = listed(
    click.option("--images", type=click.Path(path_type=Path), metavar="DIR",
                 help="Compare on these images too."),
    click.option("--limit", default=512, show_default=True, metavar="N",
                 help="Draw so many of the images, where there are more."),
)  # fmt: skip
image_set = (
    click.option(
        "--images", required=True, type=click.Path(path_type=Path), metavar="DIR|FILE.npz",
        help="A folder of images, or an .npz with `images` and, if you like, `labels`.",
    ),
    click.option("--labels", metavar="FILE[:COLUMN]", help=(
        "A csv of file names and classes; none leaves labels aside.  "
        "[default: labels.csv in the folder, or its class folders]"
    )),
    click.option("--limit", type=int, metavar="N",
                 help="Draw so many of the images; all if left out."),
    click.option("--seed", default=0, show_default=True, metavar="N", help=(
        "Seed of that draw, and of all else that is drawn."
    )),
)  # fmt: skip
kernels = click.option(
    "--kernels", default="auto", show_default=True, metavar="auto|off|PATH",
    help="Fused kernels: those of this machine, none, or a library.",
)  # fmt: skip


def out(metavar: str, help_text: str) -> Callable[[F], F]:
    """Name the file that a command writes."""
    return click.option(
        "-o", "--out", "output", required=True, type=click.Path(path_type=Path), metavar=metavar,
        help=help_text,
    )  # fmt: skip


def with_method(options: dict[str, Any]) -> dict[str, Any]:
    """Put the options of a method into its name: method "evit" and fuse "no" → "evit:fuse=no"."""
    chosen = {name: options.pop(name) for name in _METHOD_OPTIONS}
    said = ",".join(f"{name}={value}" for name, value in chosen.items() if value is not None)
    method = options["method"]
    return options | {"method": f"{method or ''}:{said}" if said else method}
