"""What a model is shown at each step, and what it should make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tomexport.calib.images import ImageSet, prepare
from tomexport.calib.learn.train import Course, Loss
from tomexport.errors import ImageError

_SMALLEST = 0.75  # of an image's sides, that a crop has


@dataclass(frozen=True)
class Lessons:
    """Images of each step, cropped at random, and the loss of what a model makes of them.

    The same step always gives the same. Images are not mirrored: digits and letters would become
    something else.

    Attributes:
        images: what to learn from.
        shape: (channels, height, width) that the model takes.
        how: crop_pct, interpolation, mean and std, as timm has them.
        course: order and seed.
        teacher: the unmerged model, whose outputs are the targets; None if the labels are.
        skipped: images that could not be read, and why.
    """

    images: ImageSet
    shape: tuple[int, int, int]
    how: Mapping[str, Any]
    course: Course
    teacher: nn.Module | None
    skipped: dict[str, str] = field(default_factory=dict)

    def __call__(self, step: int) -> tuple[Tensor, Loss]:
        """Return the images of a step, (B, channels, height, width), and their loss."""
        rng = np.random.default_rng([self.course.seed, 1, step])
        pixels, read = [], []
        for i in self.course.indices(len(self.images), step):
            window = rng.random(3)
            try:
                image = _cropped(self.images.open(i), window)
                pixels.append(prepare(image, self.shape, self.how))
                read.append(i)
            except ImageError as err:
                self.skipped[self.images.names[i]] = str(err)
        shown = torch.from_numpy(np.stack(pixels) if pixels else np.zeros((0, *self.shape), "f4"))
        return shown, self._loss(shown, read)

    def _loss(self, shown: Tensor, read: list[int]) -> Loss:
        if self.teacher is None:
            assert self.images.labels is not None
            labels = torch.tensor([self.images.labels[i] for i in read], dtype=torch.long)
            return lambda logits: functional.cross_entropy(logits, labels)
        teacher = self.teacher

        def divergence(logits: Tensor) -> Tensor:
            with torch.no_grad():
                targets = teacher(shown).log_softmax(dim=1)
            found = logits.log_softmax(dim=1)
            return functional.kl_div(found, targets, log_target=True, reduction="batchmean")

        return divergence


def _cropped(image: Any, window: Any) -> Any:
    """Crop Pillow's image to a part of its sides; window is three numbers in [0, 1)."""
    share = 1 - (1 - _SMALLEST) * window[0]
    width, height = (max(1, round(side * share)) for side in image.size)
    left = round((image.size[0] - width) * window[1])
    top = round((image.size[1] - height) * window[2])
    return image.crop((left, top, left + width, top + height))
