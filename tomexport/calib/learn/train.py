"""Train embeddings step by step, in a way that can stop anywhere and go on as if it had not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tomexport import scratch
from tomexport.delivery import write_file
from tomexport.errors import LearnError
from tomexport.exporter.rewrite import ReducedModel

_SAVE_EVERY = 15.0  # seconds
_DIGEST = 32  # bytes of SHA-256, which a state begins with
_LOWEST = 0.01  # of the learning rate, at the end
_N_RECENT = 20  # steps that the loss shown is the mean of
_N_TIMED = 4  # steps that a limit in minutes is turned into steps by

Loss = Callable[[Tensor], Tensor]
# step → images (B, channels, height, width), and the loss of what a model makes of them
Lessons = Callable[[int], tuple[Tensor, Loss]]


@dataclass(frozen=True)
class Course:
    """How long and how fast to learn.

    Attributes:
        epochs: passes over the images; None if minutes say it.
        minutes: about how long to learn, on the machine that begins.
        lr: AdamW's learning rate at the start; it falls to a hundredth along a cosine.
        batch: images per step.
        seed: for the order of the images and how they are cropped.
    """

    epochs: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no course.

        Raises: LearnError.
        """
        if (self.epochs is None) == (self.minutes is None):
            raise LearnError("Say how long to learn by --epochs or by --minutes, not by both.")
        for name in ("epochs", "minutes", "lr", "batch"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise LearnError(f"--{name} {value} is out of range; it must be more than 0.")
        if not 0 <= self.seed < 2**32:
            raise LearnError(f"--seed {self.seed} is out of range; use 0 to {2**32 - 1}.")

    def epoch(self, n: int, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and which batch of it that is, for n images."""
        return divmod(step, self.n_batches(n))

    def n_batches(self, n: int) -> int:
        """Return the steps of a pass over n images."""
        return math.ceil(n / self.batch)

    def indices(self, n: int, step: int) -> list[int]:
        """Return the images of a step, of n."""
        epoch, batch = self.epoch(n, step)
        order = np.random.default_rng([self.seed, epoch]).permutation(n)
        return [int(i) for i in np.array_split(order, self.n_batches(n))[batch]]


@dataclass
class _State:
    """All that going on needs.

    Attributes:
        request: what was asked for; another request may not go on from here.
        own: the embeddings.
        optimizer: AdamW's moments.
        step: steps done.
        n_steps: steps in all; 0 until the first ones are timed.
        seconds: spent on them.
        losses: of the last steps.
        skipped: images that could not be read, and why.
    """

    request: Mapping[str, str]
    own: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int = 0
    n_steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """What training left behind in the embeddings.

    Attributes:
        steps, seconds: how long it took, stops left out.
        resumed_at: the step at which this process went on; 0 if it began.
        loss: mean over the last steps.
    """

    steps: int
    seconds: float
    resumed_at: int
    loss: float


def train(
    soft: ReducedModel,
    lessons: Lessons,
    course: Course,
    n_images: int,
    *,
    state: Path,
    request: Mapping[str, str],
    skipped: dict[str, str],
    progress: Callable[[str], None],
) -> Learned:
    """Train a model's own weights; what was begun goes on.

    Args:
        soft: the model as it is trained; only `soft.own` learns.
        lessons: images and loss of each step.
        course: how long and how fast.
        n_images: in a pass.
        state: the file that what is done so far is kept in.
        request: all that decides the result; what was begun with another one is refused.
        skipped: where `lessons` notes images that cannot be read.
        progress: is told step, loss, images per second and time left.

    Raises: LearnError if the state is of another request or damaged, or if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(soft.own.parameters(), lr=course.lr, weight_decay=0.0)
    done = _State(dict(request), soft.own.state_dict(), optimizer.state_dict(), skipped=skipped)
    if course.epochs is not None:
        done.n_steps = course.epochs * course.n_batches(n_images)
    if state.exists():
        done = _resumed(state, done, soft.own, optimizer)
    resumed_at, saved, timed = done.step, -math.inf, deque[float](maxlen=_N_RECENT)
    with _interrupts() as interrupt:
        while not (interrupt() or 0 < done.n_steps <= done.step):
            timed.append(_advance(done, soft, lessons, course, optimizer))
            progress(_line(done, timed, course.batch))
            if time.monotonic() - saved > _SAVE_EVERY or done.step == done.n_steps:
                _save(done, soft, optimizer, state)
                saved = time.monotonic()
        if interrupt() and done.step:
            _save(done, soft, optimizer, state)
            scratch.farewell(
                f"{done.step} of {done.n_steps or '?'} steps are in {state.name}; the same command "
                "goes on"
            )
    return Learned(done.step, done.seconds, resumed_at, _recent(done.losses))


def _advance(
    done: _State, soft: ReducedModel, lessons: Lessons, course: Course,
    optimizer: torch.optim.Optimizer,
) -> float:  # fmt: skip
    """Do a step and return how many seconds it took."""
    began = time.monotonic()
    for group in optimizer.param_groups:
        group["lr"] = course.lr * _share(done.step, done.n_steps)
    if (loss := _step(soft, lessons, done.step, optimizer)) is not None:
        done.losses = [*done.losses, loss][-_N_RECENT:]
    took = time.monotonic() - began
    done.step += 1
    done.seconds += took
    if not done.n_steps and done.step >= _N_TIMED:
        assert course.minutes is not None
        done.n_steps = max(done.step, round(course.minutes * 60 / (done.seconds / done.step)))
    return took


def _step(
    soft: ReducedModel, lessons: Lessons, step: int, optimizer: torch.optim.Optimizer
) -> float | None:
    """Learn from a batch; None if none of its images can be read."""
    images, loss_of = lessons(step)
    if not len(images):
        return None
    loss = loss_of(soft(images))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(list(soft.own.parameters()), 1.0)
    optimizer.step()
    if not all(values.isfinite().all() for values in (loss, *soft.own.parameters())):
        raise LearnError(
            f"Step {step + 1} is not finite: the embeddings have left all bounds, or the model's "
            "own outputs are not finite. Lower --lr."
        )
    return float(loss.detach())


def _share(step: int, n_steps: int) -> float:
    """Return the share of the learning rate at a step; all of it while the end is not known."""
    if not n_steps:
        return 1.0
    return _LOWEST + (1 - _LOWEST) * (1 + math.cos(math.pi * step / n_steps)) / 2


def _line(done: _State, timed: deque[float], batch: int) -> str:
    each = sum(timed) / len(timed)
    of, left = "", ""
    if done.n_steps:
        minutes, seconds = divmod(round((done.n_steps - done.step) * each), 60)
        of, left = f" of {done.n_steps}", f", {minutes}:{seconds:02} left"
    return (
        f"step {done.step}{of}, loss {_recent(done.losses):.4f}, {batch / each:.1f} images/s{left}"
    )


def _recent(losses: list[float]) -> float:
    return sum(losses) / len(losses) if losses else math.nan


def _save(done: _State, soft: ReducedModel, optimizer: torch.optim.Optimizer, path: Path) -> None:
    done.own, done.optimizer = soft.own.state_dict(), optimizer.state_dict()
    content = io.BytesIO()
    torch.save(vars(done), content)
    digest = hashlib.sha256(content.getvalue()).digest()
    write_file(path, digest + content.getvalue(), force=True)


def _resumed(path: Path, fresh: _State, own: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
    """Take up what was done, if it was asked for in the same way."""
    way = f"Remove {path} to begin anew, or name another output."
    whole = path.read_bytes()
    digest, content = whole[:_DIGEST], whole[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise LearnError(f"{path} is no state of `learn`, or it is damaged. {way}")
    done = _State(**torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    if done.request != fresh.request:
        names = sorted(done.request.keys() | fresh.request.keys())
        was = ", ".join(
            f"{name} {done.request.get(name, 'none')}, now {fresh.request.get(name, 'none')}"
            for name in names
            if done.request.get(name) != fresh.request.get(name)
        )
        raise LearnError(
            f"{path} is what another request left: {was}. The same command goes on from it. {way}"
        )
    own.load_state_dict(done.own)
    optimizer.load_state_dict(done.optimizer)
    fresh.skipped.update(done.skipped)  # the one that `lessons` writes in
    done.skipped = fresh.skipped
    return done


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Hold an interrupt back until the step is done, then let it be what it would have been."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in signals]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])
