"""EViT: the tokens that the class token attends to are kept, the others fused into one.

Source: Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022 (github.com/youweiliang/evit); written from the paper.

A token's score is the attention that the class token pays it, averaged over the heads. The kept
ones stand in the order of their scores, highest first; the fused token, the sum of the others
weighted by their scores (which add up to less than 1), comes last. Later it is a token like others.
"""

from __future__ import annotations

from functools import partial

from tomexport.errors import PlanError
from tomexport.exporter.methods.method import Choice, Method, View, by_choice
from tomexport.exporter.methods.selection import class_score, keep_best
from tomexport.plan import Counting, Site, all_but_one, keep_of_met


def _choose(view: View, fuse: bool) -> Choice:
    return keep_best(view, class_score(view), fuse=fuse)


def _fused_limit(tokens: int, n_prefix: int) -> int:
    return max(0, tokens - n_prefix - 2)  # one is kept beside the fused one


def _keep_fused(share: float, tokens: int, site: Site) -> int:
    kept = keep_of_met(share, tokens, site)
    if kept == tokens - 1:
        raise PlanError(
            f"Keeping {share:g} of {tokens - site.n_prefix} tokens leaves one over, and the fused "
            f"token takes its place at {site.block}: nothing would be removed. Keep fewer, or "
            "leave that block out."
        )
    return min(kept + 1, tokens)


def _evit(fuse: str) -> Method:
    fused = fuse == "yes"
    return Method(
        name="evit",
        needs=("class_attention",),
        counting=Counting(_fused_limit, _keep_fused) if fused else Counting(all_but_one),
        reduce=by_choice(partial(_choose, fuse=fused)),
        sizes=False,
        drops=not fused,
        options={"fuse": ("yes", "no")},
        configure=_evit,
    )


EVIT = _evit(fuse="yes")
