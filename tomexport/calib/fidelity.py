"""How right a model is, and how like another one, on the same images; with 95 % intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tomexport.artifact import Array

_Z = 1.959964  # of the normal distribution, 95 % on both sides
_N_BOOTSTRAP = 2000

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A figure over images, and its 95 % interval.

    Attributes:
        value, low, high: the figure, and where it would lie on other images of the same kind.
        n: images it is from.
    """

    value: float
    low: float
    high: float
    n: int


def in_words(figure: Estimate) -> str:
    """Write a figure with its interval: "0.0157 (0.0121–0.0196)"."""
    return f"{figure.value:.4f} ({figure.low:.4f}–{figure.high:.4f})"


@dataclass(frozen=True)
class Likeness:
    """How like a reference's outputs others are, over the same images.

    Attributes:
        top1: share of images with the same first class; None for other than logits.
        kl: mean Kullback–Leibler divergence from the reference's softmax, in nats; None likewise.
        cosine: mean cosine of outputs.
    """

    top1: Estimate | None
    kl: Estimate | None
    cosine: Estimate


def likeness(reference: Array, other: Array, output: str = "logits") -> Likeness:
    """Compare outputs with those of a reference.

    Args:
        reference: (N, classes), or what else the model gives for each image.
        other: the same of the same images.
        output: "logits", or what else it is.
    """
    cosine = mean(cosines(reference, other))
    if output != "logits":
        return Likeness(None, None, cosine)
    agree = hits(other, reference.argmax(axis=1))
    return Likeness(share(agree), mean(divergences(reference, other)), cosine)


def hits(logits: Array, labels: Array, k: int = 1) -> Bools:
    """Tell for each image whether its label is among the k largest logits.

    Of equal logits the lower class comes first, as with argmax.

    Args:
        logits: (N, classes).
        labels: (N,) class indices.
        k: how many classes may be tried.

    Returns:
        (N,).
    """
    own = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
    before = np.arange(logits.shape[1])[None, :] < labels[:, None]
    ahead = (logits > own) | ((logits == own) & before)
    found: Bools = (ahead.sum(axis=1) < k) & ~np.isnan(own[:, 0])
    return found


def divergences(reference: Array, other: Array) -> Floats:
    """Return KL(softmax of reference ‖ softmax of other) of each image, in nats: (N,)."""
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    divergence: Floats = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return divergence


def cosines(a: Array, b: Array) -> Floats:
    """Return the cosine between the outputs of each image: (N,); 0 with an output of zeros."""
    a, b = (each.astype(np.float64).reshape(len(each), -1) for each in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine: Floats = (a * b).sum(axis=1) / np.where(lengths == 0, 1.0, lengths)
    return cosine


def _log_softmax(logits: Array) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log


def share(found: Bools) -> Estimate:
    """Return the share of hits, with Wilson's score interval (Wilson, 1927)."""
    n, p = len(found), float(found.mean())
    low, high = _wilson(p, n)
    return Estimate(p, low, high, n)


def _wilson(p: float, n: int) -> tuple[float, float]:
    middle = p + _Z**2 / (2 * n)
    reach = _Z * np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return max(0.0, float((middle - reach) / scale)), min(1.0, float((middle + reach) / scale))


def difference(found: Bools, reference: Bools) -> Estimate:
    """Return by how much a share of hits is above another, of the same images.

    The interval is that of paired shares (Newcombe, 1998, method 10): images on which both are
    right or both wrong say little of the difference, and it holds where no image differs, too.

    Args:
        found: (N,) hits of one model.
        reference: (N,) hits of the other.
    """
    n = len(found)
    p, q = float(found.mean()), float(reference.mean())
    (p_low, p_high), (q_low, q_high) = _wilson(p, n), _wilson(q, n)
    phi = _correlation(found, reference)
    below = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    return Estimate(p - q, p - q - float(np.sqrt(below)), p - q + float(np.sqrt(above)), n)


def _correlation(a: Bools, b: Bools) -> float:
    """Return φ of two series of hits, corrected for small counts as Newcombe does."""
    n = len(a)
    both, neither = int((a & b).sum()), int((~a & ~b).sum())
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    margins = (both + only_a) * (both + only_b) * (neither + only_a) * (neither + only_b)
    if not margins:
        return 0.0
    product = both * neither - only_a * only_b
    corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
    return float(corrected / np.sqrt(margins))


def mean(values: Floats) -> Estimate:
    """Return the mean over images, with a bootstrap of the images for its interval."""
    n = len(values)
    random = np.random.default_rng(0)
    drawn = [values[random.integers(n, size=n)].mean() for _ in range(_N_BOOTSTRAP)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), n)
