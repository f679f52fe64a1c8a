"""Merged patches, drawn over the image.

Patches that one token stands for are drawn in their mean colour, within one border; those that no
token stands for are darkened; a patch that is still by itself stays as it is.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tomexport.artifact import Array, Metadata
from tomexport.calib.images import ImageSet, preprocessing
from tomexport.calib.trace import NOWHERE, Frame, Groups, Tracer
from tomexport.delivery import check_file, write_file
from tomexport.errors import ImageError, PlanError, need
from tomexport.plan import Plan

Pixels = NDArray[np.uint8]

_SIDE = 288  # of a panel, as near as whole repeats of the pixels come
_COLUMNS = 4
_MARGIN = 16
_FONT = 14
_DARKENED = 0.25
_BORDER = 0.6  # how much of a border covers what is below
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


@dataclass(frozen=True)
class Shown:
    """The result of `show`.

    Attributes:
        artifact, image, picture: the files.
        backend, precision: what computed.
        size: of the picture file, in bytes.
        plan: of the artifact.
        frames: the layers that were drawn.
    """

    artifact: str
    image: str
    picture: str
    backend: str
    precision: str
    size: int
    plan: Plan
    frames: tuple[Frame, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON data, the groups of every layer included."""
        return {
            "artifact": self.artifact,
            "image": self.image,
            "picture": self.picture,
            "backend": self.backend,
            "precision": self.precision,
            "layers": [frame.to_dict() for frame in self.frames],
        }


def show(
    artifact: str | Path,
    image: str | Path,
    output: str | Path,
    *,
    layers: str = "all",
    backend: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> Shown:
    """Draw which patches of an image a file merges.

    Args:
        artifact: an .onnx or .xml file that tomexport wrote.
        image: an image file; it is cut and resized as the model expects.
        output: the .png to write.
        layers: "all" that remove tokens, "final", or block calls as numbers from 0: "1,4,11".
        backend: the runtime; None takes the first that is installed and reads the file.
        force: replace an existing picture.
        progress: is told what is being done.
        options: `device`, `precision` and `kernels` of `load`.

    Raises: ImageError for an image that cannot be read, PlanError for layers that the model does
        not have, ArtifactError if the file chooses no tokens, ExportError if the picture cannot be
        written, and what `load` raises. Nothing is left behind.
    """
    artifact, image, output = Path(artifact), Path(image), Path(output)
    check_file(output, ".png", "a picture", force)
    progress(f"running {artifact.name}")
    tracer = Tracer.load(artifact, backend, **options)
    metadata, plan = tracer.metadata, tracer.metadata.plan
    if not image.is_file():
        raise ImageError(f"There is no image {image}; name a file, such as a .jpg or .png.")
    (batch,) = ImageSet(image.parent, (image.name,), None, 1).batches(metadata)
    if batch.skipped:
        raise ImageError(batch.skipped[0].why)
    prepared = batch.pixels[0]
    chosen = select(tracer(prepared), plan, layers)
    size = write_file(output, png(draw(as_pixels(prepared, metadata), chosen, plan)), force)
    return Shown(
        str(artifact), str(image), str(output), tracer.runner.backend, tracer.runner.precision,
        size, plan, chosen,
    )  # fmt: skip


def select(frames: Sequence[Frame], plan: Plan, layers: str) -> tuple[Frame, ...]:
    """Return the frames that are asked for.

    Raises: PlanError for a layer that is no number, or that the model does not have.
    """
    if layers == "final":
        return tuple(frames[-1:])
    if layers == "all":
        removing = [f for f, step in zip(frames, plan.steps, strict=True) if step.removed]
        return tuple(removing[: plan.n_reductions])  # the file leaves out what is not read
    known = {str(frame.layer): frame for frame in frames}
    asked = [each.strip() for each in layers.split(",")]
    for each in asked:
        if each not in known:
            raise PlanError(
                f"{each!r} is no layer of {plan.model}: write all, final, or block calls from 0 to "
                f"{len(frames) - 1}, like 1,4,{len(frames) - 1}."
            )
    return tuple(known[each] for each in asked)


def as_pixels(image: Array, metadata: Metadata) -> Pixels:
    """Return what a prepared image looks like: (channels, H, W) float32 → (H, W, 3) uint8."""
    how = preprocessing(metadata)
    mean, std = (np.asarray(how[name], np.float32) for name in ("mean", "std"))
    if len(image) == 1:
        mean, std = mean.mean(), std.mean()
    pixels = (image.transpose(1, 2, 0) * std + mean) * 255
    whole = np.clip(pixels.round(), 0, 255).astype(np.uint8)
    return np.broadcast_to(whole, (*whole.shape[:2], 3))


def paint(pixels: Pixels, groups: Groups, side: int = _SIDE) -> Pixels:
    """Draw groups of patches over an image.

    Args:
        pixels: (H, W, 3) uint8; what no patch covers is cut off.
        groups: (rows, columns) as in `Frame`.
        side: pixels of the longer side of the result, as near as whole repeats of a pixel come.

    Returns: (h, w, 3) uint8.
    """
    rows, columns = groups.shape
    patch = min(pixels.shape[0] // rows, pixels.shape[1] // columns)
    factor = max(1, round(side / max(pixels.shape)))
    colours = _enlarged(pixels[: rows * patch, : columns * patch], factor).astype(np.float32)
    labels = _enlarged(groups, patch * factor)
    counts = np.bincount(groups[groups != NOWHERE], minlength=1)
    together = np.append(counts, 0)[labels] > 1  # of NOWHERE, the last: no
    means = _means(colours, labels, len(counts))
    painted = np.where(together[..., None], means[labels], colours)
    painted[labels == NOWHERE] *= _DARKENED
    edge = _edges(labels)
    line = np.where(painted.mean(axis=2, keepdims=True) > 140, 0, 255)
    painted = np.where(edge[..., None], _BORDER * line + (1 - _BORDER) * painted, painted)
    return painted.round().astype(np.uint8)


def _enlarged(array: Array, factor: int) -> Array:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def _means(colours: Array, labels: Groups, n: int) -> Array:
    """Return the mean colour of each label, (n + 1, 3); the last stands for NOWHERE."""
    flat = np.where(labels == NOWHERE, n, labels).ravel()
    n_pixels = np.bincount(flat, minlength=n + 1).clip(min=1)
    sums = [np.bincount(flat, colours[..., c].ravel(), n + 1) for c in range(3)]
    means: Array = np.stack(sums, axis=1) / n_pixels[:, None]
    return means


def _edges(labels: Groups) -> NDArray[np.bool_]:
    """Mark the pixels whose right or lower neighbour is of another group."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def draw(pixels: Pixels, frames: Sequence[Frame], plan: Plan) -> Any:
    """Put the image and its layers side by side, with a heading and a legend; a Pillow image."""
    image = need("PIL.Image", "calib")
    font = need("PIL.ImageFont", "calib").load_default(_FONT)
    side = _SIDE if len(frames) > 1 else 2 * _SIDE
    alone = np.arange(frames[0].groups.size).reshape(frames[0].groups.shape)
    panels = [("the image, in patches", paint(pixels, alone, side))]
    panels += [(caption(frame), paint(pixels, frame.groups, side)) for frame in frames]
    n_columns = min(len(panels), _COLUMNS)
    height, width = panels[0][1].shape[:2]
    line = _FONT + 8
    inner = n_columns * width + (n_columns - 1) * _MARGIN
    heading = _wrapped(f"{plan.model}, {plan.method}, {plan.schedule}", font, inner)
    below = _wrapped(legend(frames, plan), font, inner)
    n_rows = -(-len(panels) // n_columns)
    top = _MARGIN + line * len(heading)
    total = top + n_rows * (height + line + _MARGIN) + line * len(below) + _MARGIN // 2
    sheet = image.new("RGB", (inner + 2 * _MARGIN, total), _PAPER)
    pen = need("PIL.ImageDraw", "calib").Draw(sheet)
    for i, text in enumerate(heading):
        pen.text((_MARGIN, _MARGIN // 2 + i * line), text, _INK, font)
    for i, (text, panel) in enumerate(panels):
        row, column = divmod(i, n_columns)
        left, upper = _MARGIN + column * (width + _MARGIN), top + row * (height + line + _MARGIN)
        pen.text((left, upper), text, _INK, font)
        sheet.paste(image.fromarray(panel), (left, upper + line))
    foot = total - _MARGIN // 2 - line * len(below)
    for i, text in enumerate(below):
        pen.text((_MARGIN, foot + i * line), text, _INK, font)
    return sheet


def caption(frame: Frame) -> str:
    """Return what stands above a layer."""
    return f"layer {frame.layer}: {frame.tokens} tokens"


def legend(frames: Sequence[Frame], plan: Plan) -> str:
    """Return what stands below the layers."""
    words = [f"{plan.steps[0].tokens_in} tokens at first, {frames[-1].tokens} in the last picture."]
    if any(frame.merged for frame in frames):
        words.append("One colour in one border: patches that one token stands for.")
    if any(frame.gone for frame in frames):
        words.append(f"Dark: patches that {'wait' if frames[0].waiting else 'were dropped'}.")
    return " ".join(words)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def png(picture: Any) -> bytes:
    """Return a Pillow image as the content of a .png."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()
