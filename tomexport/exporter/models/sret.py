"""Sliced Recursive Transformer (SReT), with the layers and keys of its published checkpoints.

Source: Shen et al., "Sliced Recursive Transformer", ECCV 2022 (github.com/szq0214/SReT); written
from a description of the network.

Three stages of tokens, with strided convolutions between them. Every block is visited twice in a
row, each visit followed by a block of its own that has no attention. Attention stays inside
slices, which are runs of tokens; where the second visit slices too, it does so in another order.

The source draws that order anew at every forward. Here it is one order for each number of tokens,
drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tomexport.errors import RewriteError
from tomexport.exporter.attention import attend
from tomexport.exporter.models import registry
from tomexport.exporter.models.parts import Mlp, by_rows, on_grid

GRAIN = 32  # pixels: a stem of stride 8 and two poolings halve the grid five times
_STRIDES = (8, 16, 32)  # pixels that a token of each stage stands for
_DEPTHS = (4, 10, 6)  # calls of each stage; a block takes two
_HEADS = (2, 4, 8)
_EPSILON = 1e-6

Slices = tuple[tuple[int, int], ...]
_SLICED: Slices = ((8, 2), (4, 1), (1, 1))  # of the first and the second visit, for each stage
_FINER: Slices = ((16, 1), (14, 1), (1, 1))
_WHOLE: Slices = ((1, 1), (1, 1), (1, 1))


@dataclass(frozen=True)
class Variant:
    """A published model: its sizes, its slices and the image that it was trained on.

    Attributes:
        width: channels per head.
        heads: of each stage.
        mlp, extra: hidden channels per channel, in the shared blocks and in those between.
        slices: of the first and the second visit, for each stage.
        img_size: height and width in pixels.
    """

    width: int
    heads: tuple[int, ...]
    mlp: float
    extra: float
    slices: Slices = _SLICED
    img_size: int = 224


def _variants() -> dict[str, Variant]:
    sizes: dict[str, dict[str, Any]] = {
        "t": {"width": 32, "heads": _HEADS, "mlp": 3.6, "extra": 1.0},
        "lt": {"width": 32, "heads": _HEADS, "mlp": 4.0, "extra": 1.0},
        "s": {"width": 42, "heads": (3, 6, 12), "mlp": 3.0, "extra": 2.0},
    }
    found = {}
    for size, sized in sizes.items():
        for end in ("", "_distill"):  # trained otherwise, the same network
            found[f"sret_{size}{end}"] = Variant(**sized)
            found[f"sret_{size}_wo_slice{end}"] = Variant(**sized, slices=_WHOLE)
    found["sret_lt_16_14_1"] = Variant(**sizes["lt"], slices=_FINER)
    for name, img_size in (
        ("sret_t_wo_slice_distill_384", 384),
        ("sret_s_wo_slice_384", 384),
        ("sret_s_wo_slice_distill_512", 512),
    ):
        sized = sizes[name.split("_")[1]]
        found[name] = Variant(**sized, slices=_WHOLE, img_size=img_size)
    return found


VARIANTS = _variants()


class Scale(nn.Module):
    """A learned factor, one for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the factor."""
        return x * self.bias


class Attention(nn.Module):
    """Self-attention inside slices of the tokens."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.scale = (dim // n_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, size: Tensor | None, n_slices: int, order: Order | None
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each of n_slices runs of tokens, once they stand in the given order.

        Args:
            x: (B, N, C).
            size: (1 or B, N, 1) patches that each token stands for, which weigh its key; None
                weighs all alike.
            n_slices: a divisor of N.
            order: None leaves the tokens in their order.

        Returns:
            (B, N, C), and the keys (B, H, N, D), both in the order of x.
        """
        n_batch, n, dim = x.shape
        n_heads, n_runs, run = self.n_heads, self.n_heads * n_slices, n // n_slices
        qkv = self.qkv(x).reshape(n_batch, n, 3 * n_heads, dim // n_heads).transpose(1, 2)
        before = None
        bias = None if size is None else size.log().reshape(-1, n)  # (1 or B, N)
        if order is not None:
            before = qkv[:, n_heads : 2 * n_heads]
            qkv = qkv.index_select(2, order.forth)
        if bias is not None:
            bias = self._of_each_run(bias, n_slices, order)
        parts = qkv.reshape(n_batch, 3 * n_runs, run, dim // n_heads)
        q, k, v = torch.split(parts, n_runs, dim=1)  # (B, heads · slices, N / slices, D) each
        # in their own order the keys are these, seen otherwise: no slice to be computed
        keys = k.reshape(n_batch, n_heads, n, dim // n_heads) if before is None else before
        out = attend(q, k, v, bias, self.scale).reshape(n_batch, n_heads, n, dim // n_heads)
        if order is not None:
            out = out.index_select(2, order.back)
        return self.proj(out.transpose(1, 2).flatten(2)), keys

    def _of_each_run(self, bias: Tensor, n_slices: int, order: Order | None) -> Tensor:
        """(1 or B, N) → (1 or B, 1 or heads · slices, 1, N / slices): by one gathering."""
        n = bias.shape[1]
        if n_slices > 1:  # the slices of every head
            places = torch.arange(n) if order is None else order.forth
            bias = bias.index_select(1, places.repeat(self.n_heads))
        elif order is not None:
            bias = bias.index_select(1, order.forth)
        return bias.reshape(bias.shape[0], -1, 1, n // n_slices)


class Block(nn.Module):
    """Attention and MLP, each on a residual path with two learned factors."""

    def __init__(self, dim: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attn = Attention(dim, n_heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim, hidden)
        self.coefficient1, self.coefficient2 = Scale(), Scale()
        self.coefficient3, self.coefficient4 = Scale(), Scale()


class Extra(nn.Module):
    """The block after each visit: an MLP on a residual path with two learned factors."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim, hidden)
        self.coefficient1, self.coefficient2 = Scale(), Scale()


class Stage(nn.Module):
    """The blocks of a stage in the order of their calls: shared, extra, shared again, extra."""

    def __init__(self, dim: int, n_heads: int, n_calls: int, variant: Variant) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for call in range(n_calls):
            shared = blocks[-2] if call % 2 else Block(dim, n_heads, int(dim * variant.mlp))
            blocks += [shared, Extra(dim, int(dim * variant.extra))]
        self.blocks = nn.ModuleList(blocks)


class Stem(nn.Module):
    """Three convolutions of stride 2, each with batch norm and ReLU."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) → (B, C, height / 8, width / 8)."""
        x = functional.relu(self.bn1(self.conv1(image)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return functional.relu(self.bn3(self.conv3(x)))


class Pool(nn.Module):
    """A convolution of stride 2 that makes two channels of each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, groups=dim)


@dataclass(frozen=True)
class Order:
    """A permutation of N tokens and the way back, (N,) int64 each."""

    forth: Tensor
    back: Tensor


@dataclass(frozen=True)
class Call:
    """One visit to a shared block, with the block that follows it.

    Attributes:
        block, extra: the modules.
        n_slices: into how many runs its attention cuts the tokens.
        order: how it reorders them before, or None.
    """

    block: Block
    extra: Extra
    n_slices: int
    order: Order | None

    def attention(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, N, C) → the same after the attention residual, and the keys (B, H, N, D)."""
        block = self.block
        out, keys = block.attn(block.norm1(x), size, self.n_slices, self.order)
        return block.coefficient1(x) + block.coefficient2(out), keys

    def mlp(self, x: Tensor) -> Tensor:
        """(B, N, C) → the same after both MLP residuals."""
        block, extra = self.block, self.extra
        x = block.coefficient3(x) + block.coefficient4(block.mlp(block.norm2(x)))
        return cast(Tensor, extra.coefficient1(x) + extra.coefficient2(extra.mlp(extra.norm1(x))))


class SReT(nn.Module):
    """A sliced recursive transformer: image (B, channels, height, width) → (B, classes)."""

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        permutation_seed: int = 0,
    ) -> None:
        """Build a variant with PyTorch's own initial values.

        Args:
            variant: its sizes and slices.
            num_classes: 0 leaves out the head, and the output is features.
            img_size: height and width in pixels; None is the variant's own.
            in_chans: channels of the image.
            permutation_seed: what the orders of tokens are drawn from, in variants that reorder.

        Raises: RewriteError if the tokens of a stage do not divide into its slices.
        """
        super().__init__()
        dims = [variant.width * n_heads for n_heads in variant.heads]
        self.in_chans, self.num_classes, self.slices = in_chans, num_classes, variant.slices
        self.permutation_seed = permutation_seed if self.permutes else None
        size = variant.img_size if img_size is None else img_size
        self.img_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self._check_slices()
        self.patch_embed = Stem(in_chans, dims[0])
        self.pos_embed = nn.Parameter(torch.randn(1, dims[0], *self.grid(0)) * 0.02)
        stages = zip(dims, variant.heads, _DEPTHS, strict=True)
        self.transformers = nn.ModuleList(Stage(*each, variant) for each in stages)
        self.pools = nn.ModuleList(Pool(dim) for dim in dims[:-1])
        self.norm = nn.LayerNorm(dims[-1], eps=_EPSILON)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    @property
    def permutes(self) -> bool:
        """Whether some second visit slices, and so reorders its tokens."""
        return any(second > 1 for _, second in self.slices)

    def grid(self, stage: int) -> tuple[int, int]:
        """Return rows and columns of a stage's tokens."""
        height, width = self.img_size
        return height // _STRIDES[stage], width // _STRIDES[stage]

    def _check_slices(self) -> None:
        height, width = self.img_size
        if height % GRAIN or width % GRAIN or not height * width:
            raise RewriteError(
                f"SReT halves its image five times, so {height}×{width} pixels must be multiples "
                f"of {GRAIN}."
            )
        for stage, slices in enumerate(self.slices):
            rows, columns = self.grid(stage)
            if wrong := [n for n in slices if rows * columns % n]:
                raise RewriteError(
                    f"At {height}×{width} pixels stage {stage} has {rows * columns} tokens, which "
                    f"do not divide into {wrong[0]} slices; use another image size, or a variant "
                    "without slices."
                )

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resample the positions for another image size, (height, width) in pixels.

        Raises: RewriteError if the tokens of a stage would not divide into its slices.
        """
        self.img_size = img_size
        self._check_slices()
        resampled = functional.interpolate(
            self.pos_embed.detach(), self.grid(0), mode="bicubic", antialias=True
        )
        self.pos_embed = nn.Parameter(resampled)

    def calls(self, counts: Sequence[int]) -> tuple[Call, ...]:
        """Return the block calls of all stages in order; counts are the tokens that each sees."""
        return tuple(
            Call(block, extra, n_slices, self._order(n) if again and n_slices > 1 else None)
            for (block, extra, n_slices, again), n in zip(self._visits(), counts, strict=True)
        )

    def _visits(self) -> Iterator[tuple[Any, Any, int, bool]]:
        for stage, slices in zip(self.transformers, self.slices, strict=True):
            blocks: Any = stage.blocks
            for call in range(len(blocks) // 2):
                yield blocks[2 * call], blocks[2 * call + 1], slices[call % 2], call % 2 == 1

    def _order(self, n: int) -> Order:
        generator = torch.Generator().manual_seed(cast(int, self.permutation_seed))
        forth = torch.randperm(n, generator=generator)
        return Order(forth, forth.argsort())

    def embed(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) → tokens of the first stage, (B, N, C)."""
        return by_rows(self.patch_embed(image) + self.pos_embed)

    def downsample(self, stage: int, x: Tensor) -> Tensor:
        """All tokens of the stage before, (B, N, C) → tokens of this stage, (B, N / 4, 2 C)."""
        pool: Any = self.pools[stage - 1]
        return by_rows(pool.conv(on_grid(x, self.grid(stage - 1))))

    def classify(self, pooled: Tensor) -> Tensor:
        """(B, C) → (B, classes)."""
        return cast(Tensor, self.head(self.norm(pooled)))

    def forward_features(self, image: Tensor) -> Tensor:
        """Compute the tokens of the last stage, (B, N, C), before they are pooled."""
        sizes = [rows * columns for rows, columns in map(self.grid, range(len(_DEPTHS)))]
        calls = iter(self.calls([n for n, d in zip(sizes, _DEPTHS, strict=True) for _ in range(d)]))
        x = self.embed(image)
        for stage, depth in enumerate(_DEPTHS):
            x = self.downsample(stage, x) if stage else x
            for _ in range(depth):
                call = next(calls)
                x = call.mlp(call.attention(x, None)[0])
        return x

    def forward(self, image: Tensor) -> Tensor:
        """Compute the network with all of its tokens."""
        return self.classify(self.forward_features(image).mean(dim=1))


def register(timm: Any) -> None:
    """Add the variants to timm's registry."""
    registry.register(
        timm, __name__, SReT, VARIANTS, lambda v: {"input_size": (3, v.img_size, v.img_size)}
    )
