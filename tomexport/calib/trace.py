"""Which patches stand together after each block, read from what a file itself decides.

Every reduction in a file has a target map: the slot that each token goes to, −1 for none. Composed
over the reductions of a stage they say which patches each token stands for. Where a stage ends, or
tokens that waited come back, all tokens are there again and the composition starts anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tomexport.artifact import Array, Golden, Metadata
from tomexport.errors import ArtifactError
from tomexport.plan import Plan
from tomexport.runtime.backend import read_artifact
from tomexport.runtime.load import Runner, choose, load

NOWHERE = -1
Groups = NDArray[np.int64]


@dataclass(frozen=True)
class Frame:
    """The patches as they stand together after a block call.

    Where a method says of a dropped token whose place another takes (ToFu), it counts to that one.

    Attributes:
        layer: the call of a block, counted from 0.
        block: the block's name.
        tokens: how many are left, prefix tokens included.
        groups: (rows, columns): patches of one number are one token; numbers go by the first patch
            of each, in raster order. −1 where no token stands for the patch.
        waiting: whether patches of −1 wait and come back, rather than being dropped.
    """

    layer: int
    block: str
    tokens: int
    groups: Groups
    waiting: bool

    @property
    def merged(self) -> int:
        """Patches that share their token with others."""
        counts = np.bincount(self.groups[self.groups >= 0])
        return int(counts[counts > 1].sum())

    @property
    def gone(self) -> int:
        """Patches that no token stands for."""
        return int((self.groups == NOWHERE).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return the frame as plain JSON data."""
        return {
            "layer": self.layer,
            "block": self.block,
            "tokens": self.tokens,
            "merged": self.merged,
            "waiting" if self.waiting else "dropped": self.gone,
            "groups": self.groups.tolist(),
        }


@dataclass(frozen=True)
class Tracer:
    """A compiled file that tells where tokens go.

    Usage:
        tracer = Tracer.load(Path("model.onnx"))
        frames = tracer(image)  # (channels, H, W) float32 → one Frame for each block call

    Attributes:
        metadata, golden: what the file carries.
        runner: the compiled file.
    """

    metadata: Metadata
    golden: Golden
    runner: Runner

    @classmethod
    def load(cls, path: Path, backend: str | None = None, **options: Any) -> Tracer:
        """Load a file, exported with --trace or without: its target maps have names anyway.

        Args:
            path: an .onnx or .xml file that tomexport wrote.
            backend: the runtime; None takes the first that is installed and reads the file.
            options: `device`, `precision` and `kernels` of `load`.

        Raises: ArtifactError if the file chooses no tokens, and what `load` raises.
        """
        chosen = choose(path, backend)[0]
        metadata, golden = read_artifact(chosen, path)
        _require_decisions(path, metadata)
        runner = load(path, chosen.name, extra_outputs=metadata.decisions, **options)
        return cls(metadata, golden, runner)

    def __call__(self, image: Array) -> tuple[Frame, ...]:
        """Run an image, (channels, H, W) float32 as the model expects it."""
        batch = np.repeat(image[None], self.runner.input_shape[0] or 1, axis=0)
        targets = [target[0] for target in self.runner.outputs(batch)[1:]]
        return tuple(frames(self.metadata.plan, targets, self.metadata.input_shape[2:]))


def _require_decisions(path: Path, metadata: Metadata) -> None:
    """Refuse a file without a choice of tokens in it.

    Raises: ArtifactError saying why there is none.
    """
    plan = metadata.plan
    if not metadata.decisions:
        raise ArtifactError(
            f"{path} has no choice of tokens to show: {plan.method} with {plan.schedule} makes "
            "none that an image could change. Take a file of another method or schedule."
        )
    if len(metadata.decisions) != plan.n_reductions:
        raise ArtifactError(
            f"{path} names {len(metadata.decisions)} target maps for {plan.n_reductions} "
            "reductions; export it again."
        )


def frames(plan: Plan, targets: Sequence[Array], size: tuple[int, int]) -> Iterator[Frame]:
    """Compose the target maps of one image, block call by block call.

    Args:
        plan: the token counts.
        targets: (N,) slot of each token, −1 for none; one map for each reduction in the file.
        size: (height, width) of the image in pixels.
    """
    assert len(targets) == plan.n_reductions
    maps = iter(targets)
    waiting = waits(plan)
    slot = np.arange(0)
    for index, step in enumerate(plan.steps):
        if index == 0 or plan.steps[index - 1].restored:
            slot = np.arange(step.tokens_in)
        if step.removed and (target := next(maps, None)) is not None:
            slot = np.where(slot == NOWHERE, NOWHERE, target.astype(np.int64)[slot])
        patches = slot[step.n_prefix :]
        yield Frame(
            layer=index,
            block=step.block,
            tokens=len(np.unique(slot[slot != NOWHERE])),
            groups=_numbered(patches).reshape(grid(len(patches), size)),
            waiting=waiting,
        )


def waits(plan: Plan) -> bool:
    """Tell whether tokens that are removed wait: they come back inside a stage, or at the end."""
    ends = zip(plan.steps, (*plan.steps[1:], None), strict=True)
    return any(step.restored and (not n or n.stage == step.stage) for step, n in ends)


def _numbered(slots: Array) -> Groups:
    """Number slots by their first patches; −1 stays −1."""
    number = np.full(len(slots), NOWHERE)
    there = slots != NOWHERE
    _, first, inverse = np.unique(slots[there], return_index=True, return_inverse=True)
    number[there] = first.argsort().argsort()[inverse]
    return number


def grid(n_patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of square patches that an image is cut into.

    Raises: ArtifactError if no square patch cuts it into so many.
    """
    height, width = size
    for side in range(min(size), 0, -1):  # what is left at the edges, no patch covers
        if (height // side) * (width // side) == n_patches:
            return height // side, width // side
    raise ArtifactError(
        f"{n_patches} patches of an image of {height}×{width} pixels are not square; only square "
        "ones can be drawn over it."
    )
