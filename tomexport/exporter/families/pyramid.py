"""What PVT and CvT share: stages of tokens, convolutions of the grid, a class token in the last.

Tokens go before a block, as the slides on TPS have it, or between attention and MLP. The
convolutions take the whole grid whatever has gone: every place of it is given what the token holds
that its own went to. Keys and values are of that grid, so that each stands for as many places, and
no size weighs it; queries are of the tokens left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from tomexport.exporter.families.family import (
    Family,
    Signals,
    Tokens,
    linear_macs,
    norm_elements,
)
from tomexport.exporter.models.pyramid import Pyramid
from tomexport.plan import Cost, ModelCost, Site, Step


class Call(NamedTuple):
    """A call of a block.

    Attributes:
        block: with `norm1`, `attn`, `norm2` and `mlp`.
        stage: which it is of.
        grid: rows and columns of the stage's patches.
        n_prefix: how many class tokens it has.
    """

    block: Any
    stage: int
    grid: tuple[int, int]
    n_prefix: int

    @property
    def n_patches(self) -> int:
        """Patches of the whole grid."""
        return self.grid[0] * self.grid[1]


def family(
    name: str,
    network: type[Pyramid],
    *,
    fold: Callable[[nn.Module], None],
    cost_of: Callable[[Call], Cost],
    attention: Callable[[Call, Tokens, int | None], tuple[Tensor, Signals]],
    places: bool = False,
) -> Family:
    """Return the family of a network of `exporter/models/`.

    Args:
        name: of the family, and of the module.
        network: its class.
        fold: as in `Family`.
        cost_of: what a block costs.
        attention: as in `Family`.
        places: as in `Family`.
    """
    grain = network.strides[-1]
    return Family(
        name=name,
        modules=(name,),
        signals=("queries",),
        accepts=lambda model: type(model) is network,
        refusal=_none,
        prepare=_none,
        fold=fold,
        cost=lambda model, said: _cost(model, said, cost_of),
        input_shape=_input_shape,
        grain=lambda model: (grain, grain),
        resize=_resize,
        output=_output,
        n_read=lambda model: 1,
        embed=_embed,
        calls=calls,
        attention=attention,
        mlp=_mlp,
        head=_head,
        downsample=_downsample,
        places=places,
        grid=True,
    )


def calls(model: Any, steps: Sequence[Step] = ()) -> Sequence[Call]:
    """Return the calls of the blocks, stage by stage."""
    del steps
    return tuple(
        Call(block, stage, model.grid(stage), model.n_prefix(stage))
        for stage in range(model.n_stages)
        for block in model.blocks(stage)
    )


def _none(model: Any) -> None:
    del model


def _cost(model: Any, name: str, cost_of: Callable[[Call], Cost]) -> ModelCost:
    names = {module: said for said, module in model.named_modules()}
    sites: list[Site] = []
    for each in calls(model):
        is_next = bool(sites) and sites[-1].stage == each.stage
        sites.append(
            Site(
                stage=each.stage,
                call=sites[-1].call + 1 if is_next else 0,
                block=names[each.block],
                tokens_first=each.n_prefix + each.n_patches,
                n_prefix=each.n_prefix,
                multiple=1,
                width=each.block.attn.proj.in_features,
                cost=cost_of(each),
            )
        )
    convolutions = normalised = 0
    for stage in range(model.n_stages):
        rows, columns = model.grid(stage)
        convolutions += rows * columns * model.patches(stage).proj.weight.numel()
        normalised += rows * columns * norm_elements(model.patches(stage).norm)
    return ModelCost(
        name=name,
        sites=tuple(sites),
        fixed=convolutions + linear_macs(model.head),
        n_read=1,
        norm_fixed=normalised,
        norm_left=norm_elements(model.norm),
        head=linear_macs(model.head),
    )


def _input_shape(model: Any) -> tuple[int, int, int]:
    return (model.in_chans, *model.img_size)


def _resize(model: Any, img_size: tuple[int, int]) -> None:
    model.set_input_size(img_size)


def _output(model: Any) -> str:
    return "features" if isinstance(model.head, nn.Identity) else "logits"


def _embed(model: Any, image: Tensor) -> Tensor:
    tokens: Tensor = model.embed(0, image)
    return tokens


def _downsample(model: Any, stage: int, x: Tensor) -> Tensor:
    tokens: Tensor = model.embed(stage, x)
    return tokens


def _mlp(call: Call, x: Tensor) -> Tensor:
    block = call.block
    added: Tensor = block.mlp(block.norm2(x))
    return x + added


def _head(model: Any, x: Tensor, size: Tensor | None) -> Tensor:
    del size  # of the class token, which is one
    output: Tensor = model.head(model.norm(x)[:, 0])
    return output
