"""Methods whose counts depend on the image, which no file of fixed counts can hold."""

from __future__ import annotations

from tomexport.errors import RewriteError

# name: (why it cannot be had, what to use instead)
ADAPTIVE = {
    "a-vit": (
        "it halts each token where its own sum passes a threshold, and its code computes all of "
        "them under a mask, so with fixed counts it would save nothing",
        "evit or topk, which need no weights of their own either",
    ),
    "spvit": (
        "its selectors keep as many tokens of an image as pass a threshold, head by head",
        "evit, which also puts what it drops into one token",
    ),
    "ia-red2": (
        "its policy decides for each image how many tokens stay, and code that runs it alone is "
        "not published",
        "dynamicvit or dtps, whose predictors score tokens and keep a fixed number",
    ),
}


def refuse_adaptive(name: str) -> None:
    """Refuse a method by name, with the reason.

    Raises: RewriteError if its counts depend on the image.
    """
    if name in ADAPTIVE:
        reason, instead = ADAPTIVE[name]
        raise RewriteError(
            f"{name} has no fixed counts: {reason}. Every token count of a file is known before "
            f"it runs; use {instead}."
        )
