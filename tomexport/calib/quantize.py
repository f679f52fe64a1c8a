"""An exported file → the same in int8, with its proof: what it loses and what it gains, measured.

The tool is that of the runtime: NNCF writes .xml, ONNX Runtime's own .onnx. What chooses tokens
stays float32, and so do our own nodes, so that fused kernels run in an int8 file as in any other.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tomexport.artifact import GOLDEN_KEY, METADATA_KEY, Golden, Metadata
from tomexport.calib.evaluate import Accuracy, Evaluated, Judge, label_array, n_classes
from tomexport.calib.images import ImageSet, Skipped, require_some
from tomexport.calib.outputs import Progress, compute, file_engine, parts
from tomexport.calib.quantizers import onnx as with_onnx_runtime
from tomexport.calib.quantizers import openvino as with_nncf
from tomexport.calib.quantizers.calibration import Calibration
from tomexport.delivery import check_output, publish, staging
from tomexport.errors import ArtifactError, ExportError, ImageError, pick
from tomexport.runtime.backend import read_artifact
from tomexport.runtime.baselines import BOUND, NONE, beside
from tomexport.runtime.load import BACKENDS, require_readable
from tomexport.runtime.machine import int8_instructions
from tomexport.runtime.profile import times
from tomexport.runtime.timing import Interval, Job, medians, take_turns, worker
from tomexport.runtime.verify import VerifyReport, verify

N_CALIBRATED = 300  # images, unless another number is asked for
N_JUDGED = 500  # images that are judged, of those that were not calibrated on
MIN_JUDGED = 50  # fewer are too few: then those that were calibrated on are judged as well
_LAUNCHES, _ROUNDS, _SECONDS = 3, 7, 4.0  # of timing: seconds for each launch


@dataclass(frozen=True)
class Tool:
    """What makes a file int8.

    Attributes:
        name: of the package.
        backend: the runtime whose files it writes.
        suffix: of these.
        quantize: does it.
        asked: says which products choices read.
        settings: how, for the metadata.
    """

    name: str
    backend: str
    suffix: str
    quantize: Callable[..., None]
    asked: Callable[[Path, Metadata], tuple[int, ...]]
    settings: dict[str, Any]


TOOLS = (
    Tool("nncf", "openvino", ".xml", with_nncf.quantize, with_nncf.asked,
         with_nncf.SETTINGS),
    Tool("onnxruntime", "onnxruntime", ".onnx", with_onnx_runtime.quantize,
         with_onnx_runtime.asked, with_onnx_runtime.SETTINGS),
)  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Milliseconds a call, each file in the precision that its runtime takes by itself.

    Attributes:
        before_ms, after_ms: median calls.
        before_precision, after_precision: what each was computed in, apart from int8.
        speedup: before over after, with its interval.
    """

    before_ms: float
    after_ms: float
    before_precision: str
    after_precision: str
    speedup: Interval


@dataclass(frozen=True)
class QuantizeReport:
    """The result of `quantize`.

    Attributes:
        path: the int8 file.
        source: what it was made from.
        tool: what made it, with its version.
        files: all files written, with their sizes in bytes; empty if a limit was missed.
        size_before: bytes of the source and its weights.
        n_calibrated: images that it was calibrated on.
        judged: which images it was judged on, in words.
        skipped: images that could not be read.
        kept_float: nodes that stay float: ours, what only chooses tokens, what large choices read.
        before: accuracy of the source in float32; None without labels.
        after: the int8 file, in the precision that the runtime gives the rest of it by itself,
            beside its source in float32, image by image.
        speed: None if it was not timed.
        verify: beside PyTorch, as `verify` does.
        verdict: what can be said, in words.
        notes: what the user should know.
        baselines: the same of the files that `profile` compares it with, if they were asked for.
    """

    path: str
    source: str
    tool: str
    files: dict[str, int]
    size_before: int
    n_calibrated: int
    judged: str
    skipped: tuple[Skipped, ...]
    kept_float: int
    before: Accuracy | None
    after: Evaluated
    speed: Speed | None
    verify: VerifyReport
    verdict: str
    notes: tuple[str, ...]
    baselines: tuple[QuantizeReport, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the file keeps the limits."""
        return not self.after.failures and all(report.passed for report in self.baselines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return {"passed": self.passed} | dataclasses.asdict(self)


def quantize(
    path: str | Path,
    images: ImageSet,
    output: str | Path,
    *,
    limit: int = N_CALIBRATED,
    seed: int = 0,
    min_agreement: float | None = None,
    timed: bool = True,
    with_baselines: bool = False,
    force: bool = False,
    progress: Progress = lambda message: None,
) -> QuantizeReport:
    """Write a file in int8, and measure what that loses and gains.

    Usage:
        report = quantize("model.onnx", ImageSet.find(Path("photos"), None), "model.int8.xml")
        report.verdict

    Args:
        path: a float file that tomexport wrote.
        images: to calibrate on, and others to judge on; labels are used for judging alone.
        output: the file; .xml is made by NNCF for OpenVINO, .onnx by ONNX Runtime.
        limit: images to calibrate on.
        seed: for drawing them.
        min_agreement: the least share of images with the source's first class; below, nothing is
            written.
        timed: time both files.
        with_baselines: quantize STEM.none and STEM.bound, beside the file, alike: the same
            products stay float.
        force: replace an existing file.
        progress: is told what is being done.

    Raises: ExportError, ArtifactError or ImageError saying what cannot be, MissingExtraError
        without the tool, BackendError without the runtime. Nothing is left behind.
    """
    path, output = Path(path), Path(output)
    wanted = {path: output} | {
        beside(path, name): beside(output, name) for name in (NONE, BOUND) if with_baselines
    }
    for source, target in wanted.items():
        check_output(source, target, force)
    tool = _tool(path, output)
    backend = pick("backend", BACKENDS, tool.backend)
    for source in wanted:
        require_readable(source, backend)
    metadata, golden = read_artifact(backend, path)
    if metadata.quantization:
        raise ArtifactError(f"{path} is int8 already; quantize the float file it was made from.")
    images = images.classed(n_classes(metadata, golden))
    drawn = _draw(images, limit, seed)
    judge = Judge(metadata.output, label_array(drawn.judged), None, min_agreement)
    judge.check_limits()
    asked = tool.asked(path, metadata)
    reports: list[QuantizeReport] = []
    with staging(output) as folder:
        for source, target in wanted.items():
            one = _One(tool, source, target, folder / target.name, drawn, asked, progress)
            reports.append(one.make(judge, timed=timed and source == path))
            judge = dataclasses.replace(judge, min_agreement=None)  # baselines have no limits
            if not reports[0].passed:
                break
        files = publish(folder, output, force) if reports[0].passed else {}
    first, *rest = (dataclasses.replace(each, files=_own(files, each.path)) for each in reports)
    return dataclasses.replace(first, baselines=tuple(rest))


def _own(files: dict[str, int], path: str) -> dict[str, int]:
    """Return those of the files that a path's consists of."""
    return {str(part): files[str(part)] for part in parts(Path(path)) if str(part) in files}


@dataclass(frozen=True)
class _One:
    """A file to make of another.

    Attributes:
        tool: what makes it.
        source: the float file.
        output: what it will be called.
        staged: where it is written.
        drawn: images to calibrate on, and to judge on.
        asked: which products stay float, because choices read them.
        progress: is told what is being done.
    """

    tool: Tool
    source: Path
    output: Path
    staged: Path
    drawn: _Draw
    asked: Sequence[int]
    progress: Progress

    def make(self, judge: Judge, *, timed: bool) -> QuantizeReport:
        """Write it, and judge it as it is computed when nothing is asked for."""
        name, drawn, progress = self.tool.backend, self.drawn, self.progress
        metadata, golden = read_artifact(pick("backend", BACKENDS, name), self.source)
        progress("reading the images to calibrate on")
        calibration, skipped = _readable(drawn.calibrated, metadata)
        said = _write(
            self.tool, self.source, self.staged, calibration, golden, self.asked, progress
        )
        proof = verify(self.staged, backend=name, progress=progress)
        before = compute(file_engine(self.source, name, precision="f32"), drawn.judged, metadata,
                         progress)  # fmt: skip
        engine = file_engine(self.staged, name)
        found = compute(engine, drawn.judged, metadata, progress)
        after = judge.run(engine, found, before)
        speed = None
        if timed:
            speed = _time(self.source, self.staged, name, calibration.batch, progress)
        return QuantizeReport(
            str(self.output), str(self.source), f"{said['tool']} {said['version']}", {},
            size_before=sum(part.stat().st_size for part in parts(self.source)),
            n_calibrated=said["images"],
            judged=drawn.judged.described(found.skipped)
            + (", those calibrated on among them" if drawn.same else ""),
            skipped=tuple(dict.fromkeys((*skipped, *found.skipped))),
            kept_float=said["kept_float"],
            before=judge.accuracy(before), after=after, speed=speed,
            verify=dataclasses.replace(proof, path=str(self.output)),
            verdict=_verdict(speed, after), notes=(*drawn.judged.notes, *drawn.notes),
        )  # fmt: skip


def write_int8(path: Path, output: Path, images: ImageSet, progress: Progress) -> None:
    """Write what `quantize` writes by default, without judging it; that is done elsewhere.

    Args:
        path: a float file that tomexport wrote.
        output: the file, which is replaced if it is there.
        images: to draw those from that it is calibrated on.
        progress: is told what is being done.

    Raises: as `quantize`.
    """
    tool = _tool(path, output)
    metadata, golden = read_artifact(pick("backend", BACKENDS, tool.backend), path)
    calibration = _readable(_draw(images, N_CALIBRATED, 0).calibrated, metadata)[0]
    _write(tool, path, output, calibration, golden, tool.asked(path, metadata), progress)


def _write(
    tool: Tool, path: Path, staged: Path, calibration: Calibration, golden: Golden,
    asked: Sequence[int], progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Write the int8 form of a file, and return what its metadata say of that."""
    said = {"tool": tool.name, "version": importlib.metadata.version(tool.name),
            "images": len(calibration) * calibration.batch, **tool.settings}  # fmt: skip

    def text(n_kept: int) -> dict[str, str]:
        said["kept_float"] = n_kept
        own = dataclasses.replace(calibration.metadata, quantization=said)
        return {METADATA_KEY: own.to_json(), GOLDEN_KEY: golden.to_text()}

    progress(f"quantizing with {tool.name}")
    tool.quantize(path, staged, calibration, asked, text)
    return said


def _tool(path: Path, output: Path) -> Tool:
    tool = next(tool for tool in TOOLS if tool.suffix == output.suffix)
    if path.suffix not in pick("backend", BACKENDS, tool.backend).suffixes:
        raise ExportError(
            f"{output.name} is made from an .onnx, and {path.name} is OpenVINO's; name the output "
            ".xml, or give the .onnx."
        )
    return tool


@dataclass(frozen=True)
class _Draw:
    """Images to calibrate on, and to judge on: others, where there are enough."""

    calibrated: ImageSet
    judged: ImageSet
    same: bool

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.same:
            return ()
        return (
            f"{len(self.judged) - len(self.calibrated)} images beside those that it was calibrated "
            f"on are too few to judge int8 by, {MIN_JUDGED} are needed: all {len(self.judged)} "
            "judge it",
        )


def _draw(images: ImageSet, limit: int, seed: int) -> _Draw:
    if limit < 1:
        raise ImageError(f"Calibrating on {limit} images says nothing; use 1 or more.")
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    rest = order[limit : limit + N_JUDGED]
    same = len(rest) < MIN_JUDGED
    judged = order[: limit + N_JUDGED] if same else rest
    return _Draw(images.take(sorted(order[:limit])), images.take(sorted(judged)), same)


def _readable(images: ImageSet, metadata: Metadata) -> tuple[Calibration, tuple[Skipped, ...]]:
    """Return what can be calibrated on, and what cannot be read."""
    batches = [(batch.indices, batch.skipped) for batch in images.batches(metadata)]
    skipped = tuple(each for _, missing in batches for each in missing)
    require_some(images, skipped)
    found = Calibration(images, tuple(i for indices, _ in batches for i in indices), metadata)
    if not len(found):
        raise ImageError(
            f"{len(found.indices)} images do not fill one batch of {found.batch}, which the file "
            "takes; give more, or export it with a smaller --batch."
        )
    return found, skipped


def _time(before: Path, after: Path, backend: str, batch: int, progress: Progress) -> Speed:
    """Let both files take turns, each launched anew a few times."""
    launches = []
    for launch in range(_LAUNCHES):
        told = partial(_tell, progress, f"timing, launch {launch + 1} of {_LAUNCHES}")
        with ExitStack() as stack:
            jobs = [Job(str(path), backend, batch=batch) for path in (before, after)]
            workers = [stack.enter_context(worker(job)) for job in jobs]
            launches.append(take_turns(workers, _ROUNDS, _SECONDS, told))
    shared = min(len(turns) for launch in launches for turns in launch)
    ms = np.array([[medians(turns[:shared]) for turns in launch] for launch in launches])
    return Speed(
        float(np.median(ms[:, 0])), float(np.median(ms[:, 1])), workers[0].precision,
        workers[1].precision, Interval.of(ms[:, 0] / ms[:, 1]),
    )  # fmt: skip


def _tell(progress: Progress, what: str, message: str) -> None:
    progress(f"{what}: {message}")


def _verdict(speed: Speed | None, after: Evaluated) -> str:
    """Say in words what the intervals allow to say."""
    return f"{_gain(speed)}{' and ' if speed else ''}{_loss(after)}."


def _gain(speed: Speed | None) -> str:
    if speed is None:
        return "int8 "
    found = times(speed.speedup)
    if speed.speedup.low > 1:
        return f"int8 is faster here, {found},"
    if speed.speedup.high < 1:
        why = "" if int8_instructions() else ": this CPU has no instructions for it, such as VNNI"
        return f"int8 is slower here, {found}{why},"
    return f"int8 is neither faster nor slower here that one could tell, {found},"


def _loss(after: Evaluated) -> str:
    if after.change:
        change = after.change.top1
        between = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
        if not change.value:
            return f"keeps its top-1 ({between})"
        verb = "gains" if change.value > 0 else "loses"
        return f"{verb} {abs(100 * change.value):.1f} % top-1 ({between})"
    assert after.likeness is not None
    if after.likeness.top1:
        same = after.likeness.top1
        return (
            f"has the first class of float32 on {100 * same.value:.1f} % of images "
            f"({100 * same.low:.1f}–{100 * same.high:.1f})"
        )
    return f"gives features of cosine {after.likeness.cosine.value:.4f} to float32's"
