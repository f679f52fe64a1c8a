"""Images from a folder, prepared as the model expects them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tomexport.artifact import Array, Metadata
from tomexport.errors import TomexportError, need, plain

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class ImageError(TomexportError):
    """A folder without images, or an image that cannot be read."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder and its sub-folders, in the order of their names.

    Usage:
        images = ImageFolder.find(Path("photos"))
        prepared = images(metadata)  # (B, 3, height, width) float32

    Attributes:
        folder: where they are.
        files: those to take.
        n_found: how many there are.
    """

    folder: Path
    files: tuple[Path, ...]
    n_found: int

    @classmethod
    def find(cls, folder: Path, limit: int = 512) -> ImageFolder:
        """List a folder's images; of more than `limit`, so many evenly spread.

        Raises: ImageError if there is no such folder or no image in it.
        """
        if not folder.is_dir():
            raise ImageError(f"There is no folder {folder}; --images takes a folder of images.")
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not files:
            raise ImageError(
                f"{folder} holds no image; the suffixes that count are {', '.join(SUFFIXES)}."
            )
        n_taken = min(limit, len(files))
        return cls(
            folder, tuple(files[i * len(files) // n_taken] for i in range(n_taken)), len(files)
        )

    @property
    def description(self) -> str:
        """Which images these are, in words."""
        some = "all" if len(self.files) == self.n_found else f"{len(self.files)} of {self.n_found}"
        return f"{some} of {self.folder}" if some == "all" else f"{some} in {self.folder}"

    def __call__(self, metadata: Metadata) -> Array:
        """Load the images as a file's metadata says; see `load`."""
        return load(self.files, metadata)


def load(files: Sequence[Path], metadata: Metadata) -> Array:
    """Load images as a file's metadata says: resize the shorter side, crop the centre, normalise.

    Where the architecture's names differ in mean and std, those of the first are taken: for
    comparing runtimes any will do.

    Returns:
        (B, 3, height, width) float32.

    Raises: ImageError naming the file that cannot be read, or if the model takes no RGB images.
    """
    channels, height, width = metadata.input_shape[1:]
    if channels != 3:
        raise ImageError(f"The model takes {channels} channels; image files give 3.")
    how = metadata.preprocessing or next(iter(metadata.candidates.values()), None) or _PLAIN
    return np.stack([prepare(file, (height, width), how) for file in files])


_PLAIN = {"crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}


def prepare(file: Path, size: tuple[int, int], how: dict[str, Any]) -> Array:
    """Load one image: (3, height, width) float32.

    Args:
        file: image of any mode; it is converted to RGB.
        size: (height, width) in pixels.
        how: crop_pct, interpolation, mean and std, as timm has them.

    Raises: ImageError if the file is no readable image.
    """
    image_module = need("PIL.Image", "calib")
    filters = image_module.Resampling
    kind = {"bicubic": filters.BICUBIC, "bilinear": filters.BILINEAR}.get(
        how["interpolation"], filters.BICUBIC
    )
    try:
        with image_module.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as err:
        raise ImageError(f"{file} is no readable image ({plain(err)}).") from err
    scale = math.floor(min(size) / how["crop_pct"]) / min(image.size)
    resized = [
        max(side, round(length * scale))
        for side, length in zip(size[::-1], image.size, strict=True)
    ]
    image = image.resize(resized, kind)
    left, top = (round((a - b) / 2) for a, b in zip(image.size, size[::-1], strict=True))
    image = image.crop((left, top, left + size[1], top + size[0]))
    pixels = np.asarray(image, np.float32) / 255
    normal = (pixels - np.asarray(how["mean"], np.float32)) / np.asarray(how["std"], np.float32)
    result: Array = np.ascontiguousarray(normal.transpose(2, 0, 1))
    return result
