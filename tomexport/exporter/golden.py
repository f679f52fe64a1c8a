"""What PyTorch computes, kept as the truth that files are compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tomexport.artifact import Array, Golden
from tomexport.errors import RewriteError
from tomexport.exporter.rewrite import ReducedModel


def record(reduced: ReducedModel, original: nn.Module, images: Array) -> Golden:
    """Run the reduced and the original module on images, (B, channels, height, width) float32.

    Raises: RewriteError if an output is not finite.
    """
    was_training = original.training
    original.eval()
    outputs, originals, traces = [], [], []
    with torch.no_grad():
        for image in images:  # one by one, so that memory stays small
            batch = torch.from_numpy(image[None])
            output, decisions = reduced.trace(batch)
            outputs.append(output.numpy())
            originals.append(reduced.original(original, batch).numpy())
            traces.append(decisions)
    original.train(was_training)
    sites = list(zip(*traces, strict=True))
    golden = Golden(
        images=images,
        reduced=np.concatenate(outputs),
        original=np.concatenate(originals),
        targets=tuple(np.concatenate([d.target.numpy() for d in site]) for site in sites),
        margins=np.array([[float(d.margin) for d in site] for site in sites], np.float32).reshape(
            len(sites), len(images)
        ),
    )
    for name, values in (("original", golden.original), ("reduced", golden.reduced)):
        if not np.isfinite(values).all():
            raise RewriteError(
                f"The {name} model gives values that are not finite; nothing can be proven of it. "
                "Check its weights."
            )
    return golden


def beyond_budget(reduced: ReducedModel, images: Array, called: str) -> tuple[str, ...]:
    """Say how many images ask for more tokens than are kept, of a method that counts by image.

    Args:
        reduced: the model.
        images: (B, channels, height, width) float32.
        called: what the images are, in words.

    Returns:
        A note, or none for methods that keep as many of every image.
    """
    if not (reduced.counts_by_image and reduced.plan.n_reductions):
        return ()
    with torch.no_grad():
        traces = [reduced.trace(torch.from_numpy(image[None]))[1] for image in images]
    asked = np.array([[int(d.asked) for d in each if d.asked is not None] for each in traces])
    steps = [step for step in reduced.plan.steps if step.removed][: asked.shape[1]]
    n_beyond = int((asked > [step.tokens_out for step in steps]).any(axis=1).sum())
    places = "; ".join(
        f"{step.block} keeps {step.tokens_out}, they ask for {low} to {high}"
        for step, low, high in zip(steps, asked.min(axis=0), asked.max(axis=0), strict=True)
    )
    return (
        f"{n_beyond} of {len(images)} images ({called}) ask {reduced.plan.method} for more tokens "
        f"than are kept: {places}",
    )
