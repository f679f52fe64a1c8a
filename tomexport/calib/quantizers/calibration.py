"""What both tools take: images to calibrate on, opened as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tomexport.artifact import Array, Metadata
from tomexport.calib.images import ImageSet


@dataclass(frozen=True)
class Calibration:
    """Images that can be read, in batches as a file takes them.

    Attributes:
        images: the set.
        indices: those of it that can be read.
        metadata: of the file, which says how to prepare them.
    """

    images: ImageSet
    indices: tuple[int, ...]
    metadata: Metadata

    @property
    def batch(self) -> int:
        """Images per call: the file's, or 1."""
        return self.metadata.input_shape[0] or 1

    def __len__(self) -> int:
        return len(self.indices) // self.batch

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Array:
        """Return one batch: (B, channels, height, width) float32."""
        start = index * self.batch
        chosen = self.images.take(self.indices[start : start + self.batch])
        return np.concatenate([b.pixels for b in chosen.batches(self.metadata, self.batch)])
