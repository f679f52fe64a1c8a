"""Images of the user's own, from a folder or an .npz, prepared as the model expects them.

They are streamed: a set knows names and labels, and opens its images batch by batch. What cannot
be read is left out, and named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tomexport.artifact import Array, Metadata
from tomexport.calib.labels import Labels, class_folders, from_csv
from tomexport.errors import ImageError, need, plain

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LABELS = "labels.csv"  # found by itself beside the images
NO_LABELS = "none"  # what --labels says to leave them aside
BATCH = 32
PREPARED = 2  # the version of `prepare`: outputs that are kept are of the same pixels
_MOST_PIXELS = 10**8  # of a resized image, before it is cropped


def _silent(message: str) -> None:
    del message


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Batch:
    """Images that were read, and those that were not.

    Attributes:
        pixels: (B, channels, height, width) float32.
        indices: which images of the set these are.
        skipped: those that could not be read.
    """

    pixels: Array
    indices: tuple[int, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class ImageSet:
    """Images with or without labels, in the order of their names.

    Usage:
        images = ImageSet.find(Path("photos"), limit=500)
        prepared, what = images(metadata)  # (B, 3, height, width) float32

    Attributes:
        source: the folder or .npz.
        names: those to take: paths within the folder, or images[0] … in an .npz.
        labels: the class of each, None where it has none; None if no image has one.
        n_found: how many images there are.
        notes: where the labels are from, in words.
        n_names: names that labels are numbered by, in sorted order; 0 where numbers were given.
        pixels: (N, height, width, 3) or (N, height, width) uint8 of an .npz, those to take.
    """

    source: Path
    names: tuple[str, ...]
    labels: tuple[int | None, ...] | None
    n_found: int
    notes: tuple[str, ...] = ()
    n_names: int = 0
    pixels: Array | None = field(default=None, repr=False, compare=False)

    @classmethod
    def find(
        cls, source: Path, limit: int | None = 512, seed: int = 0, labels: str | None = None
    ) -> ImageSet:
        """List the images of a folder and its sub-folders, or of an .npz.

        Labels of a folder are those of the csv named, or of `labels.csv` in it, or its class
        folders if all images are in such: the first folder by name is class 0. An .npz holds
        `images` and, if it likes, `labels`.

        Args:
            source: folder or .npz.
            limit: take at most so many, drawn by the seed; fewer of one seed are part of more.
            seed: for that draw.
            labels: FILE or FILE:COLUMN, a csv with a column of file names and one of classes; or
                "none", to leave aside what labels there are.

        Raises: ImageError if there is no image, or if labels do not fit them.
        """
        if limit is not None and limit < 1:
            raise ImageError(f"A limit of {limit} leaves no image; use 1 or more.")
        if seed < 0:
            raise ImageError(f"Seed {seed} is negative; use 0 or more.")
        given = None if labels == NO_LABELS else labels
        found = _from_npz(source, given) if source.is_file() else _from_folder(source, given)
        if labels == NO_LABELS:
            found = dataclasses.replace(found, labels=None, notes=(), n_names=0)
        return found._drawn(limit, seed)

    def _drawn(self, limit: int | None, seed: int) -> ImageSet:
        if limit is None or limit >= len(self.names):
            return self
        order = np.random.default_rng(seed).permutation(len(self.names))[:limit]
        return self.take(np.sort(order).tolist())

    def take(self, indices: Sequence[int]) -> ImageSet:
        """Return some of the images, by their indices."""
        pick = list(indices)
        return ImageSet(
            self.source,
            tuple(self.names[i] for i in pick),
            self.labels and tuple(self.labels[i] for i in pick),
            self.n_found,
            self.notes,
            self.n_names,
            None if self.pixels is None else self.pixels[pick],
        )

    def classed(self, n_classes: int | None) -> ImageSet:
        """Return the same images with labels that are a model's classes, or with none.

        Args:
            n_classes: of the model; None for one whose outputs are no classes.

        Raises: ImageError if a label is none of its classes.
        """
        if self.labels is None:
            return self
        if n_classes is None:
            return self._unlabelled("the model gives no classes: labels are left aside")
        if self.n_names and self.n_names != n_classes:
            return self._unlabelled(
                f"these are left aside: {self.n_names} names do not say which of the model's "
                f"{n_classes} classes is which; --labels FILE with class indices does"
            )
        for name, label in zip(self.names, self.labels, strict=True):
            if label is not None and not 0 <= label < n_classes:
                raise ImageError(
                    f"{name} is of class {label}, and the model has {n_classes}, counted from 0. "
                    "Name another column with --labels FILE:COLUMN, or leave labels aside with "
                    "--labels none."
                )
        return self

    def _unlabelled(self, why: str) -> ImageSet:
        return dataclasses.replace(self, labels=None, notes=(*self.notes, why), n_names=0)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def description(self) -> str:
        """Which images these are, in words."""
        if len(self.names) == self.n_found:
            return f"all of {self.source}"
        return f"{len(self.names)} of {self.n_found} in {self.source}"

    def digest(self, indices: Sequence[int]) -> str:
        """Return the SHA-256 of some images, as they are stored."""
        total = hashlib.sha256()
        for i in indices:
            total.update(f"{self.names[i]}\0".encode())
            total.update(hashlib.sha256(self._stored(i)).digest())
        return total.hexdigest()

    def _stored(self, index: int) -> bytes:
        if self.pixels is not None:
            return bytes(self.pixels[index].tobytes())
        try:
            return (self.source / self.names[index]).read_bytes()
        except OSError as err:  # it is skipped later, with this as the reason
            return plain(err).encode()

    def open(self, index: int) -> Any:
        """Open one image: of any mode, by Pillow.

        Raises: ImageError naming an image that cannot be read.
        """
        image = need("PIL.Image", "calib")
        if self.pixels is not None:
            return image.fromarray(self.pixels[index])
        file = self.source / self.names[index]
        try:
            with image.open(file) as opened:
                opened.load()
                return opened
        except Exception as err:  # a damaged file raises what it likes in its decoder
            raise ImageError(f"{file} is no readable image ({plain(err)}).") from err

    def batches(
        self, metadata: Metadata, size: int = BATCH, progress: Callable[[str], None] = _silent
    ) -> Iterator[Batch]:
        """Prepare the images as a file's metadata says, so many at a time; see `prepare`.

        Raises: ImageError if the model takes no images of this kind.
        """
        channels, height, width = metadata.input_shape[1:]
        how = preprocessing(metadata)
        if channels not in (1, 3):
            raise ImageError(f"The model takes {channels} channels; images give 3, or 1 for grey.")
        if not all(0 <= mean <= 1 for mean in how["mean"]):
            raise ImageError(
                f"The model takes a signal of mean {how['mean'][0]:g}: no pixels, they lie in 0 … 1"
            )
        for start in range(0, len(self), size):
            progress(f"image {start + 1} of {len(self)}")
            pixels, indices, skipped = [], [], []
            for i in range(start, min(start + size, len(self))):
                try:
                    pixels.append(prepare(self.open(i), (channels, height, width), how))
                    indices.append(i)
                except ImageError as err:
                    skipped.append(Skipped(self.names[i], str(err)))
            stacked = np.stack(pixels) if pixels else np.zeros((0, channels, height, width), "f4")
            yield Batch(stacked, tuple(indices), tuple(skipped))

    def __call__(self, metadata: Metadata) -> tuple[Array, str]:
        """Prepare all images as a file's metadata says, and say which these are.

        Raises: ImageError if none can be read.
        """
        batches = list(self.batches(metadata))
        skipped = [each for batch in batches for each in batch.skipped]
        require_some(self, skipped)
        return np.concatenate([b.pixels for b in batches]), self.described(skipped)

    def described(self, skipped: Sequence[Skipped]) -> str:
        """Say which images these are, and which of them could not be read."""
        if not skipped:
            return self.description
        names = ", ".join(each.name for each in skipped[:3]) + (", …" if len(skipped) > 3 else "")
        return f"{self.description}, less {len(skipped)} unreadable: {names}"


def require_some(images: ImageSet, skipped: Sequence[Skipped]) -> None:
    """Refuse a set of which no image could be read.

    Raises: ImageError with the first reason.
    """
    if len(skipped) == len(images):
        raise ImageError(
            f"None of the {len(images)} images of {images.source} could be read, so there is "
            f"nothing to go by. The first: {skipped[0].why}"
        )


def _from_folder(folder: Path, labels: str | None) -> ImageSet:
    if not folder.is_dir():
        raise ImageError(
            f"There is no folder {folder}; --images takes a folder of images, or an .npz of them."
        )
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise ImageError(
            f"{folder} holds no image; the suffixes that count are {', '.join(SUFFIXES)}."
        )
    names = tuple(file.relative_to(folder).as_posix() for file in files)
    found: Labels | None
    if labels is not None:
        found = from_csv(labels, names)
    elif (folder / LABELS).is_file():
        found = from_csv(str(folder / LABELS), names)
    else:
        found = class_folders(names)
    if found is None:
        return ImageSet(folder, names, None, len(names))
    return ImageSet(folder, names, found.classes, len(names), (found.note,), found.n_names)


def _from_npz(path: Path, labels: str | None) -> ImageSet:
    if path.suffix != ".npz":
        raise ImageError(f"{path} is a file; --images takes a folder of images, or an .npz.")
    if labels is not None:
        raise ImageError(f"{path} carries its own labels, if any; leave out --labels.")
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            pixels = file["images"]
            classes = file["labels"] if "labels" in file.files else None
    except Exception as err:  # a damaged archive raises what it likes
        raise ImageError(
            f"{path} is no .npz with an array `images` ({plain(err)}). Write it with "
            "numpy.savez(file, images=…, labels=…)."
        ) from err
    n, shape = len(pixels) if pixels.ndim else 0, "×".join(map(str, pixels.shape))
    grey_or_rgb = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] == 3)
    if pixels.dtype != np.uint8 or not grey_or_rgb or not pixels.size:
        raise ImageError(
            f"`images` of {path} is {pixels.dtype} of {shape}; it must be uint8, images × height "
            "× width × 3, or without the 3 for grey."
        )
    if classes is not None and (classes.shape != (n,) or classes.dtype.kind not in "iu"):
        raise ImageError(
            f"`labels` of {path} is {classes.dtype} of {'×'.join(map(str, classes.shape))}; it "
            f"must be one class index for each of the {n} images."
        )
    names = tuple(f"images[{i}]" for i in range(n))
    if classes is None:
        return ImageSet(path, names, None, n, pixels=pixels)
    note = f"labels are those of {path.name}"
    known = tuple(None if each == -1 else each for each in classes.tolist())
    return ImageSet(path, names, known, n, (note,), pixels=pixels)


PLAIN: Mapping[str, Any] = {
    "crop_mode": "center", "crop_pct": 1.0, "interpolation": "bicubic",
    "mean": [0.5] * 3, "std": [0.5] * 3,
}  # fmt: skip


def preprocessing(metadata: Metadata) -> Mapping[str, Any]:
    """Return how a file wants its images: size, crop, filter, mean and std, as timm has them.

    Where the architecture's names differ in mean and std, those of the first are taken; where
    nothing is known, the whole image, bicubic, in [−1, 1].
    """
    return metadata.preprocessing or next(iter(metadata.candidates.values()), None) or PLAIN


def prepare(image: Any, shape: tuple[int, int, int], how: Mapping[str, Any]) -> Array:
    """Resize an image, take its centre, normalise: what timm's own evaluation transform does.

    Args:
        image: Pillow's, of any mode but 32-bit ones; it is converted to RGB, or to grey for one
            channel.
        shape: (channels, height, width) of the result.
        how: crop_mode, crop_pct, interpolation, mean and std, as timm has them. Of three means, a
            model of one channel takes the mean.

    Returns:
        (channels, height, width) float32.

    Raises: ImageError if the image is so long and thin that it would not fit into memory, or if
        what is white in it is not known.
    """
    channels, height, width = shape
    filters = need("PIL.Image", "calib").Resampling
    kind = getattr(filters, str(how["interpolation"]).upper(), filters.BICUBIC)
    resized = _resized(image.size, (width, height), how)
    if math.prod(resized) > _MOST_PIXELS:
        raise ImageError(
            f"The image is {image.size[0]}×{image.size[1]} pixels, too long and thin to be resized "
            f"to {min(resized)} on its shorter side."
        )
    image = _in_8_bits(image).convert("RGB" if channels == 3 else "L").resize(resized, kind)
    mean, std = (np.asarray(how[name], np.float32) for name in ("mean", "std"))
    if channels == 1:
        mean, std = mean.mean(), std.mean()
    pixels = _centre(np.asarray(image).reshape(*resized[::-1], channels), height, width, mean)
    result: Array = np.ascontiguousarray(
        ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)
    )
    return result


def _resized(
    size: tuple[int, int], wanted: tuple[int, int], how: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the width and height that an image is resized to before its centre is taken."""
    scale = tuple(math.floor(side / how["crop_pct"]) for side in wanted)
    mode = how.get("crop_mode", PLAIN["crop_mode"])
    if mode == "squash":
        return scale[0], scale[1]
    ratios = [have / want for have, want in zip(size, scale, strict=True)]
    if mode == "center" and scale[0] == scale[1]:  # torchvision cuts the longer side's fraction off
        short, long = min(size), max(size)
        longer = int(scale[0] * long / short)
        return (scale[0], longer) if size[0] <= size[1] else (longer, scale[0])
    ratio = max(ratios) if mode == "border" else min(ratios)
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _in_8_bits(image: Any) -> Any:
    """Bring 16-bit grey down to 8, which Pillow's own conversion would cut off at white.

    Raises: ImageError for 32 bits.
    """
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image, np.float32) / 257).round().astype(np.uint8)
        return need("PIL.Image", "calib").fromarray(grey)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"Its pixels are of 32 bits (mode {image.mode}), so that what is white is not known; "
            "save it with 8 or 16 bits."
        )
    return image


def _centre(pixels: Array, height: int, width: int, mean: Array) -> Array:
    """Cut the centre out of (rows, columns, channels) uint8; what is missing is filled with mean.

    Args:
        pixels: of the resized image.
        height: of the centre.
        width: likewise.
        mean: (channels,), as a share of white.
    """
    for axis, side in ((0, height), (1, width)):
        over = pixels.shape[axis] - side
        if over > 0:
            pixels = np.take(pixels, np.arange(side) + round(over / 2), axis)
        elif over < 0:
            shape = [*pixels.shape]
            shape[axis] = -over
            fill = np.broadcast_to((mean * 255).round().astype(np.uint8), shape)
            first, last = np.split(fill, [-over // 2], axis)
            pixels = np.concatenate([first, pixels, last], axis)
    return pixels
