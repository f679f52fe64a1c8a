"""PVT and CvT, whole or with dTPS, written a second time: shares no code with the package.

From the weights of a state dict, one image at a time, head by head, in float64. Before a block
tokens can be squeezed into others; before each convolution the grid is filled place by place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

# (block call, patch tokens (N, C)) → the score of each
Scores = Callable[[int, Tensor], list[float]]


@dataclass
class Stage:
    """The tokens of a stage, (N, C), and what became of those that it began with.

    Attributes:
        tokens: those left.
        n_prefix: how many at the front stay.
        owner: which of them each of the first ones went to.
        leader: which of the first ones each of them goes back to.
    """

    tokens: Tensor
    n_prefix: int
    owner: list[int] = field(default_factory=list)
    leader: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owner = list(range(len(self.tokens)))
        self.leader = list(range(len(self.tokens)))

    def squeeze(self, scores: list[float], n: int) -> None:
        """Keep the n patches of the highest scores; each other joins the one most like it."""
        first = self.n_prefix
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        rows = {i: [(math.e, i)] for i in ranked[:n]}
        for i in ranked[n:]:
            alike = {j: _cosine(self.tokens[first + i], self.tokens[first + j]) for j in rows}
            host = max(alike, key=lambda j: (alike[j], -ranked.index(j)))
            rows[host].append((math.exp(alike[host]), i))
        slot = {p: p for p in range(first)}
        slot |= {first + i: first + s for s, row in enumerate(rows.values()) for _, i in row}
        means = [
            sum(w * self.tokens[first + i] for w, i in row) / sum(w for w, _ in row)
            for row in rows.values()
        ]
        self.leader = [self.leader[t] for t in (*range(first), *(first + i for i in rows))]
        self.owner = [slot[t] for t in self.owner]
        self.tokens = torch.stack([*self.tokens[:first], *means])

    def filled(self, x: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Spread (M, C) over the first tokens' places: the prefix, and (C, rows, columns)."""
        grid = torch.empty(x.shape[1], *shape, dtype=x.dtype)
        for place, slot in enumerate(self.owner[self.n_prefix :]):
            grid[:, place // shape[1], place % shape[1]] = x[slot]
        return x[: self.n_prefix], grid


def pvt(
    state: Mapping[str, Tensor],
    image: Tensor,
    heads: tuple[int, ...],
    kept: Mapping[int, int] | None = None,
    scores: Scores | None = None,
) -> Tensor:
    """Run one image (3, H, W) through a PVT.

    Args:
        state: the weights, under their published names.
        image: the image.
        heads: of each stage.
        kept: block call → the patch tokens that are left before it.
        scores: what they are kept by.

    Returns:
        (classes,) float64.
    """
    w = {key: tensor.double() for key, tensor in state.items()}
    x, call = image.double(), 0
    for number, n_heads in enumerate(heads, start=1):
        x = _convolved(x, w, f"patch_embed{number}.proj")
        shape = (x.shape[1], x.shape[2])
        tokens = _norm(x.flatten(1).T, w, f"patch_embed{number}.norm", 1e-5)
        if number == 4:
            tokens = torch.cat([w["cls_token"][0], tokens])
        stage = Stage(tokens + w[f"pos_embed{number}"][0], int(number == 4))
        for index in range(_count(w, f"block{number}.")):
            at = f"block{number}.{index}."
            _squeeze(stage, call, kept, scores)
            call += 1
            h = seen = _norm(stage.tokens, w, f"{at}norm1", 1e-6)
            if number < 4:
                grid = stage.filled(h, shape)[1]
                coarse = _convolved(grid, w, f"{at}attn.sr")
                seen = _norm(coarse.flatten(1).T, w, f"{at}attn.norm", 1e-5)
            k, v = _linear(seen, w, f"{at}attn.kv").chunk(2, dim=1)
            q = _linear(h, w, f"{at}attn.q")
            out = _attended(q, k, v, n_heads, (q.shape[1] // n_heads) ** -0.5)
            stage.tokens = stage.tokens + _linear(out, w, f"{at}attn.proj")
            h = _linear(_norm(stage.tokens, w, f"{at}norm2", 1e-6), w, f"{at}mlp.fc1")
            h = h * (1 + torch.erf(h / 2**0.5)) / 2
            stage.tokens = stage.tokens + _linear(h, w, f"{at}mlp.fc2")
        x = stage.filled(stage.tokens, shape)[1]
    return _linear(_norm(stage.tokens[:1], w, "norm", 1e-6), w, "head")[0]


def cvt(
    state: Mapping[str, Tensor],
    image: Tensor,
    heads: tuple[int, ...],
    kept: Mapping[int, int] | None = None,
    scores: Scores | None = None,
) -> Tensor:
    """Run one image (3, H, W) through a CvT; see `pvt`."""
    w = {key: tensor.double() for key, tensor in state.items()}
    x, call = image.double(), 0
    for number, n_heads in enumerate(heads):
        stride, padding = (2, 1) if number else (4, 2)
        x = _convolved(x, w, f"stage{number}.patch_embed.proj", stride, padding)
        shape = (x.shape[1], x.shape[2])
        tokens = _norm(x.flatten(1).T, w, f"stage{number}.patch_embed.norm", 1e-5)
        if number == 2:
            tokens = torch.cat([w["stage2.cls_token"][0], tokens])
        stage = Stage(tokens, int(number == 2))
        for index in range(_count(w, f"stage{number}.blocks.")):
            at = f"stage{number}.blocks.{index}."
            _squeeze(stage, call, kept, scores)
            call += 1
            prefix, grid = stage.filled(_norm(stage.tokens, w, f"{at}norm1", 1e-5), shape)
            q, k, v = (
                torch.cat([prefix, _depthwise(grid, w, f"{at}attn.conv_proj_{part}", stride)])
                for part, stride in (("q", 1), ("k", 2), ("v", 2))
            )
            q = torch.stack([q[place] for place in stage.leader])
            q, k, v = (
                _linear(each, w, f"{at}attn.proj_{part}")
                for part, each in (("q", q), ("k", k), ("v", v))
            )
            out = _attended(q, k, v, n_heads, q.shape[1] ** -0.5)
            stage.tokens = stage.tokens + _linear(out, w, f"{at}attn.proj")
            h = _linear(_norm(stage.tokens, w, f"{at}norm2", 1e-5), w, f"{at}mlp.fc1")
            h = h / (1 + (-1.702 * h).exp())
            stage.tokens = stage.tokens + _linear(h, w, f"{at}mlp.fc2")
        x = stage.filled(stage.tokens, shape)[1]
    return _linear(_norm(stage.tokens[:1], w, "norm", 1e-5), w, "head")[0]


def _count(w: Mapping[str, Tensor], start: str) -> int:
    return len({key.removeprefix(start).split(".")[0] for key in w if key.startswith(start)})


def _squeeze(
    stage: Stage, call: int, kept: Mapping[int, int] | None, scores: Scores | None
) -> None:
    if kept and scores and call in kept:
        stage.squeeze(scores(call, stage.tokens[stage.n_prefix :]), kept[call])


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / ((a.norm() + 1e-6) * (b.norm() + 1e-6)))


def _convolved(
    x: Tensor, w: Mapping[str, Tensor], name: str, stride: int | None = None, padding: int = 0
) -> Tensor:
    kernel, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return functional.conv2d(x[None], kernel, bias, stride or kernel.shape[-1], padding)[0]


def _depthwise(x: Tensor, w: Mapping[str, Tensor], name: str, stride: int) -> Tensor:
    """(C, rows, columns) → (N, C)."""
    kernel = w[f"{name}.conv.weight"]
    x = functional.conv2d(x[None], kernel, None, stride, 1, groups=len(kernel))[0].flatten(1).T
    mean, variance, weight, bias = (
        w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def _attended(q: Tensor, k: Tensor, v: Tensor, n_heads: int, scale: float) -> Tensor:
    outs = []
    for each in zip(*(part.chunk(n_heads, dim=1) for part in (q, k, v)), strict=True):
        weights = (each[0] @ each[1].T * scale).exp()
        outs.append(weights / weights.sum(1, keepdim=True) @ each[2])
    return torch.cat(outs, 1)


def _linear(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(x: Tensor, w: Mapping[str, Tensor], name: str, epsilon: float) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(1, keepdim=True) + epsilon).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]
