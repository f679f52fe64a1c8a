"""All that is known of a file on one page of HTML that needs nothing else.

What is not given is found out: the file is verified, timed for some seconds, and asked what it
merges on a few images.
"""

from __future__ import annotations

import base64
import hashlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tomexport import __version__
from tomexport.artifact import Array, Metadata
from tomexport.calib.evaluate import EvaluateReport
from tomexport.calib.fidelity import Estimate, in_words
from tomexport.calib.images import ImageSet, require_some
from tomexport.calib.report.axis import Axis
from tomexport.calib.report.read import Front, read
from tomexport.calib.show import Pixels, as_pixels, caption, paint, select
from tomexport.calib.trace import Frame, Groups, Tracer, waits
from tomexport.delivery import check_file, write_file
from tomexport.errors import ArtifactError, need
from tomexport.plan import Plan
from tomexport.runtime.backend import read_artifact
from tomexport.runtime.baselines import NONE
from tomexport.runtime.load import choose
from tomexport.runtime.profile import ProfileReport, percent, profile, times
from tomexport.runtime.timing import MIN_ROUNDS
from tomexport.runtime.verify import VerifyReport, verify

Progress = Callable[[str], None]
T = TypeVar("T")

_HERE = Path(__file__).parent
N_IMAGES = 4
_N_GOLDEN = 2
_N_LAYERS = 4  # of each image
_SIDE = 240
_N_OPERATORS = 10


@dataclass(frozen=True)
class Panel:
    """A picture on the page.

    Attributes:
        caption: what stands below it.
        alt: what it shows, in words.
        source: the picture itself, as a data URI.
    """

    caption: str
    alt: str
    source: str


@dataclass(frozen=True)
class Gallery:
    """An image, and what became of it in some layers."""

    name: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Shown:
    """What a file merges.

    Attributes:
        images: on which images, in words.
        galleries: one for each of them.
        waiting: whether tokens that are removed wait, rather than being dropped.
        why_not: why there is nothing to show, if there is not.
    """

    images: str = ""
    galleries: tuple[Gallery, ...] = ()
    waiting: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Mark:
    """A point of the chart of ways to run a model.

    Attributes:
        x, y: milliseconds, and loss or GMACs.
        kind: what its colour stands for.
        tip: what is said of it.
        best: whether it is on the front.
        chosen: whether it is the one that was taken.
    """

    x: float
    y: float
    kind: str
    tip: str
    best: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Choices:
    """The chart of ways to run a model.

    Attributes:
        marks: its points.
        x, y: its axes.
        y_label: what the vertical one shows.
        searched: whether a search found them, or they are the variants that were timed.
    """

    marks: tuple[Mark, ...]
    x: Axis
    y: Axis
    y_label: str
    searched: bool

    @property
    def kinds(self) -> list[str]:
        """What colours stand for, in the order of the colours."""
        return list(dict.fromkeys(mark.kind for mark in self.marks))

    @property
    def front(self) -> list[Mark]:
        """The points on the front, the fastest first."""
        return sorted((m for m in self.marks if m.best), key=lambda mark: mark.x)


@dataclass(frozen=True)
class Findings:
    """What a page says.

    Attributes:
        name: of the file.
        metadata: what the file says of itself.
        parity: whether it computes what PyTorch computes.
        profile: how fast it is.
        shown: what it merges.
        choices: what else there is to choose.
        evaluation: how good it is on images; None if nobody measured.
    """

    name: str
    metadata: Metadata
    parity: VerifyReport
    profile: ProfileReport
    shown: Shown
    choices: Choices
    evaluation: EvaluateReport | None


@dataclass(frozen=True)
class Report:
    """The result of `report`.

    Attributes:
        path: the page.
        size: its bytes.
        artifact: what it is about.
        verify: whether the file computes what PyTorch computes.
        images: how many images it shows.
    """

    path: str
    size: int
    artifact: str
    verify: VerifyReport
    images: int

    @property
    def passed(self) -> bool:
        """Whether the file computes what PyTorch computes."""
        return self.verify.passed

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON data."""
        return {
            "passed": self.passed, "path": self.path, "bytes": self.size,
            "artifact": self.artifact, "images": self.images, "verify": self.verify.to_dict(),
        }  # fmt: skip


def report(
    artifact: str | Path,
    output: str | Path,
    *,
    images: ImageSet | None = None,
    profile: str | Path | None = None,
    front: str | Path | None = None,
    evaluation: str | Path | None = None,
    seconds: float = 3.0,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = lambda message: None,
) -> Report:
    """Write a page on a file: plan, parity, latency, operators, choices, merged patches.

    Args:
        artifact: an .onnx or .xml file that tomexport wrote.
        output: the .html to write.
        images: what to show merging on; None takes two of the file's own, which are drawn.
        profile: what `profile --json` wrote; None times the file here and now.
        front: what `search` wrote; None shows the variants that were timed.
        evaluation: what `evaluate --json` wrote; None says nothing of accuracy.
        seconds: to time each runtime and precision for, without `profile`.
        threads: CPU threads to time with; None takes all.
        force: replace an existing page.
        progress: is told what is being done.

    Raises: ArtifactError for a JSON file of another kind, or of another model; ExportError if the
        page cannot be written; and what `verify`, `profile` and `load` raise.
    """
    artifact, output = Path(artifact), Path(output)
    need("jinja2", "calib")
    check_file(output, ".html", "a report", force)
    metadata = read_artifact(choose(artifact, None)[0], artifact)[0]
    plan = metadata.plan
    given = _Given.read(plan, profile, front, evaluation)
    progress("verifying")
    parity = verify(artifact, progress=progress)
    timed = given.profile or _timed(artifact, seconds, threads, progress)
    progress("drawing merged patches")
    try:
        shown = _shown(artifact, images)
    except ArtifactError as err:  # it chooses nothing, or patches are no squares
        shown = Shown(why_not=str(err))
    choices = _searched(given.front) if given.front else _variants(timed, plan)
    found = Findings(artifact.name, metadata, parity, timed, shown, choices, given.evaluation)
    size = write_file(output, page(found).encode(), force)
    return Report(str(output), size, str(artifact), parity, len(shown.galleries))


def page(found: Findings) -> str:
    """Return the page, which loads nothing and runs no script but its own."""
    script = _trusted("report.js")
    plan = found.metadata.plan
    done = [step for step in plan.steps if step.removed][: plan.n_reductions]
    html: str = _template().render(
        found=found, plan=plan, done=done,
        n_operators=_N_OPERATORS, version=__version__,
        time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        style=_trusted("report.css"), script=script, script_hash=_hash(script),
    )  # fmt: skip
    return html


def _template() -> Any:
    jinja = need("jinja2", "calib")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(_HERE), autoescape=True, undefined=jinja.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "times": times, "percent": percent, "share": _share, "figure": in_words, "axis": Axis.over,
    }  # fmt: skip
    return environment.get_template("report.html")


def _share(share: Estimate) -> str:
    """Write a share of images: "91.2 % (89.0–93.0)"."""
    return f"{share.value * 100:.1f} % ({share.low * 100:.1f}–{share.high * 100:.1f})"


def _trusted(name: str) -> Any:
    """Return a file of our own, marked as what need not be escaped."""
    return need("markupsafe", "calib").Markup((_HERE / name).read_text(encoding="utf-8"))


def _hash(script: str) -> str:
    """Return what the page's policy allows to run, and nothing else."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# --- what other commands found


@dataclass(frozen=True)
class _Given:
    """What other commands wrote of the same model."""

    profile: ProfileReport | None
    front: Front | None
    evaluation: EvaluateReport | None

    @classmethod
    def read(
        cls, plan: Plan, profile: str | Path | None, front: str | Path | None,
        evaluation: str | Path | None,
    ) -> _Given:  # fmt: skip
        """Read them, and refuse those of another model."""
        given = cls(
            _read(profile, ProfileReport, "tomexport profile FILE --json"),
            _read(front, Front, "tomexport search MODEL --json"),
            _read(evaluation, EvaluateReport, "tomexport evaluate FILE --json"),
        )
        own = {"model": plan.model, "method": plan.method, "schedule": plan.schedule}
        for path, value in ((profile, given.profile), (front, given.front),
                            (evaluation, given.evaluation)):  # fmt: skip
            for what, wanted in own.items():
                if getattr(value, what, wanted) != wanted:
                    raise ArtifactError(
                        f"{path} is of another file: its {what} is {getattr(value, what)}, and "
                        f"{wanted} is needed. Write it anew for this one."
                    )
        runs = given.profile.runs if given.profile else ()
        if given.profile and not (runs and all(run.variants for run in runs)):
            raise ArtifactError(f"{profile} holds no run, so there is no latency to show.")
        if given.front and not given.front.points:
            raise ArtifactError(f"{front} holds no point, so there is no front to show.")
        if given.evaluation and not given.evaluation.runs:
            raise ArtifactError(f"{evaluation} holds no run, so there is no accuracy to show.")
        return given


def _read(path: str | Path | None, kind: type[T], command: str) -> T | None:
    return read(Path(path), kind, command) if path else None


def _timed(
    artifact: Path, seconds: float, threads: int | None, progress: Progress
) -> ProfileReport:
    return profile(
        artifact, threads=threads, rounds=2 * MIN_ROUNDS, launches=2, seconds=seconds,
        progress=progress,
    )  # fmt: skip


def _searched(front: Front) -> Choices:
    marks = [
        Mark(
            p.latency_ms, p.loss, p.precision,
            f"{p.schedule}\n{p.method}, {p.precision}\n{p.latency_ms:.2f} ms, {p.gmac:.3f} GMACs\n"
            f"loss {p.loss:.2%}"
            + ("" if p.held_out_loss is None else f", held out {p.held_out_loss:.2%}"),
            p.on_front, p.chosen,
        )
        for p in front.points
    ]  # fmt: skip
    if front.unmerged:
        ms = front.unmerged.latency_ms
        marks.append(Mark(ms, 0.0, "unmerged", f"unmerged\n{ms:.2f} ms\nloss 0"))
    return _chart(marks, f"loss: {front.loss}", searched=True)


def _variants(timed: ProfileReport, plan: Plan) -> Choices:
    marks = []
    for run in timed.runs:
        for variant in run.variants:
            gmac = (plan.macs_unreduced if variant.name == NONE else plan.macs) / 1e9
            kind = f"{run.backend} {run.precision}"
            kind += f", batch {run.batch}" if run.batch > 1 else ""
            tip = f"{variant.name}\n{kind}\n{variant.median_ms:.2f} ms, {gmac:.3f} GMACs"
            marks.append(Mark(variant.median_ms, gmac, kind, tip))
    return _chart(marks, "GMACs of an image", searched=False)


def _chart(marks: Sequence[Mark], y_label: str, *, searched: bool) -> Choices:
    x, y = Axis.over((m.x for m in marks), zero=False), Axis.over(m.y for m in marks)
    return Choices(tuple(marks), x, y, y_label, searched)


# --- merged patches


def _shown(artifact: Path, images: ImageSet | None) -> Shown:
    tracer = Tracer.load(artifact)
    if images is None:
        drawn = [
            (f"golden image {i}", image, _as_drawn(image))
            for i, image in enumerate(tracer.golden.images[:_N_GOLDEN])
        ]
        words = "drawn images that the file carries; give photographs with --images"
    else:
        batches = list(images.batches(tracer.metadata))
        skipped = [each for batch in batches for each in batch.skipped]
        require_some(images, skipped)
        words = images.described(skipped)
        drawn = [
            (images.names[index], image, as_pixels(image, tracer.metadata))
            for batch in batches
            for index, image in zip(batch.indices, batch.pixels, strict=True)
        ]
    galleries = tuple(_gallery(tracer, *each) for each in drawn)
    return Shown(words, galleries, waits(tracer.metadata.plan))


def _as_drawn(golden: Array) -> Pixels:
    """Return what a golden image looks like: (channels, H, W) in [−1, 1] → (H, W, 3) uint8."""
    levels = ((golden.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
    n_colours = 3 if len(golden) >= 3 else 1
    return np.broadcast_to(levels[..., :n_colours], (*levels.shape[:2], 3))


def _gallery(tracer: Tracer, name: str, prepared: Array, pixels: Pixels) -> Gallery:
    frames = tracer(prepared)
    alone = np.arange(frames[0].groups.size).reshape(frames[0].groups.shape)
    panels = [Panel("the image", f"{name}, as the model is given it", _uri(pixels, alone))]
    for frame in _some(select(frames, tracer.metadata.plan, "all")):
        gone = f"{frame.gone} {'wait' if frame.waiting else 'are dropped'}"
        words = (
            f"{name} after block call {frame.layer}: {frame.tokens} tokens are left; "
            f"{frame.merged} of {frame.groups.size} patches share one, {gone}"
        )
        panels.append(Panel(caption(frame), words, _uri(pixels, frame.groups)))
    return Gallery(name, tuple(panels))


def _some(frames: Sequence[Frame]) -> list[Frame]:
    """Return some of the layers, evenly spread, the last among them."""
    n = min(_N_LAYERS, len(frames))
    return [frames[(i + 1) * len(frames) // n - 1] for i in range(n)]


def _uri(pixels: Pixels, groups: Groups) -> str:
    """Return a painted image as a data URI."""
    content = io.BytesIO()
    image = need("PIL.Image", "calib").fromarray(paint(pixels, groups, _SIDE))
    image.save(content, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
