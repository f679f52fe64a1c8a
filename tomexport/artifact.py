"""What an exported file carries: its metadata and its golden set. No torch.

Both are text, so that ONNX `metadata_props` and OpenVINO `rt_info` hold them alike: the metadata
as JSON, the golden set as a compressed .npz in base64. The golden images are not stored; they are
drawn again from their seed, in integer arithmetic that gives the same pixels everywhere.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tomexport.errors import ArtifactError
from tomexport.plan import Plan

DOMAIN = "tomexport"  # of the operators, and of everything we write into a file
METADATA_KEY = "metadata"
GOLDEN_KEY = "golden"
FORMAT_VERSION = 1
TOKENS = "tokens"  # an output: one feature of each patch
N_GOLDEN = 8
N_GOLDEN_TOKENS = 2  # each is as large as all tokens of an image
GOLDEN_SEED = 2023
# what `Metadata.weights` says where there is no file; after RANDOM comes the seed
IN_MEMORY, PRETRAINED, RANDOM = "a module in memory", "timm, pretrained", "random, seed"

Array = NDArray[Any]


@dataclass(frozen=True)
class Metadata:
    """What a file says of itself.

    Attributes:
        plan: token counts and MACs.
        names: timm names of the architecture; more than one if the weights cannot tell.
        input_shape: (batch, channels, height, width); batch None if it is dynamic.
        output: "logits", "features" or "tokens".
        ops: "custom" or "portable".
        prop_attn: whether keys are weighted by the patches they stand for.
        half: whether weights are stored as float16.
        decisions: names of the target maps inside the graph, one per reduction.
        weights: where the weights are from, in words.
        weights_sha256: hash of the weights.
        preprocessing: how images are prepared, or None if it is not known.
        candidates: preprocessing of each name, where the names differ in it.
        versions: of the software that wrote the file.
        opset: ONNX opset of the graph.
        permutation_seed: what the orders were drawn from in which a model's attention takes its
            tokens: for n tokens, torch.randperm(n) after manual_seed. None where it does not
            reorder.
        quantization: how the file became int8: the tool and its version, its settings, the images
            it was calibrated on, how many nodes stayed float. None where it did not.
    """

    plan: Plan
    names: tuple[str, ...]
    input_shape: tuple[int | None, int, int, int]
    output: str
    ops: str
    prop_attn: bool
    half: bool
    decisions: tuple[str, ...]
    weights: str
    weights_sha256: str
    preprocessing: dict[str, Any] | None
    candidates: dict[str, Any]
    versions: dict[str, str]
    opset: int
    permutation_seed: int | None = None
    quantization: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Return the metadata as one JSON document."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["plan"] = self.plan.to_dict()
        return json.dumps({"format_version": FORMAT_VERSION} | fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """Read what `to_json` wrote.

        Raises: ArtifactError if it is of a newer format or not readable.
        """
        try:
            data = json.loads(text)
            version = data.pop("format_version")
            if version > FORMAT_VERSION:
                raise ArtifactError(
                    f"The file's metadata is of format {version}; this tomexport reads up to "
                    f"{FORMAT_VERSION}. Update it: pip install -U tomexport"
                )
            data["plan"] = Plan.from_dict(data["plan"])
            for name in ("names", "input_shape", "decisions"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise ArtifactError(
                f"The file's metadata cannot be read ({err!r}); export it again."
            ) from err


@dataclass(frozen=True)
class Golden:
    """Inputs and what PyTorch computed from them.

    Attributes:
        images: (B, channels, height, width) float32.
        reduced: (B, classes) outputs of the reduced module; tokens are (B, patches, channels).
        original: the same of the original module.
        targets: one (B, N) map per reduction: the slot of each token.
        margins: (reductions, B) how far the nearest other decision was.
    """

    images: Array
    reduced: Array
    original: Array
    targets: tuple[Array, ...]
    margins: Array

    def to_text(self) -> str:
        """Return the set without its images, compressed, as text."""
        arrays: dict[str, Any] = {
            "reduced": self.reduced,
            "original": self.original,
            "margins": self.margins,
        }
        arrays |= {f"target_{i}": t.astype(np.int16) for i, t in enumerate(self.targets)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    @classmethod
    def from_text(cls, text: str, input_shape: tuple[int | None, int, int, int]) -> Golden:
        """Read what `to_text` wrote, and draw its images again.

        Raises: ArtifactError if it is not readable.
        """
        try:
            with np.load(io.BytesIO(base64.b64decode(text, validate=True))) as file:
                arrays = {name: file[name] for name in file.files}
            n_targets = sum(name.startswith("target_") for name in arrays)
            targets = tuple(arrays[f"target_{i}"].astype(np.int64) for i in range(n_targets))
            reduced, original, margins = (arrays[n] for n in ("reduced", "original", "margins"))
        except (ValueError, KeyError, OSError, EOFError, RuntimeError,
                binascii.Error, zipfile.BadZipFile, zlib.error) as err:  # fmt: skip
            raise ArtifactError(
                f"The file's golden set is damaged ({err}); export it again."
            ) from err
        if len(margins) != n_targets:
            raise ArtifactError(
                f"The file's golden set is damaged ({n_targets} target maps, but margins of "
                f"{len(margins)}); export it again."
            )
        images = golden_images(input_shape[1:], len(reduced))
        return cls(images, reduced, original, targets, margins)


def golden_images(shape: tuple[int, int, int], count: int = N_GOLDEN) -> Array:
    """Draw images with the statistics of photographs, the same on every machine.

    Dead leaves: discs that hide one another, with radii of density r⁻³, have the edges and the
    1/f spectrum of natural scenes; each leaf carries a gradient and a grain of its own, so that
    no two patches are equal.

    Args:
        shape: (channels, height, width).
        count: images to draw.

    Returns:
        (count, channels, height, width) float32 in [−1, 1], multiples of 1/127.5.
    """
    return np.stack([_dead_leaves(shape, GOLDEN_SEED + i) for i in range(count)])


def _dead_leaves(shape: tuple[int, int, int], seed: int) -> Array:
    channels, height, width = shape
    draw = _Draw(seed)
    side = max(height, width)
    pixels = np.zeros((channels, height, width), np.int64)
    for leaf in range(240):
        # the first leaf is the background; then the inverse of the cumulative density of r⁻³
        # between side/64 and side, in integers
        radius = math.isqrt(side * side // (1 + draw.below(4095))) if leaf else 2 * side
        y, x = draw.below(height), draw.below(width)
        slope_y, slope_x = draw.below(129) - 64, draw.below(129) - 64
        top, left = max(0, y - radius), max(0, x - radius)
        window = pixels[:, top : y + radius + 1, left : x + radius + 1]
        down = np.arange(top, top + window.shape[1])[:, None] - y
        right = np.arange(left, left + window.shape[2])[None, :] - x
        inside = down**2 + right**2 <= radius * radius
        shade = (down * slope_y + right * slope_x)[inside] // max(radius, 1)
        tone = draw.below(256)
        for channel in range(channels):
            window[channel][inside] = tone + draw.below(97) - 48 + shade
    grain = draw.many(channels * height * width).reshape(channels, height, width) >> np.uint64(60)
    pixels = np.clip(pixels, 8, 248) + grain.astype(np.int64) - 8  # no grain is clipped away
    return (pixels.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)


class _Draw:
    """SplitMix64 (Steele et al., 2014): a stream of integers that no library version changes."""

    def __init__(self, seed: int) -> None:
        self._state = seed
        self._state = int(self.many(1)[0])  # streams of neighbouring seeds lie far apart

    def many(self, count: int) -> NDArray[np.uint64]:
        step = np.uint64(0x9E3779B97F4A7C15)
        z = np.uint64(self._state) + step * np.arange(1, count + 1, dtype=np.uint64)
        self._state = (self._state + 0x9E3779B97F4A7C15 * count) % 2**64
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def below(self, bound: int) -> int:
        return int(self.many(1)[0]) % bound
