"""The whole way: model → plan → reduced module → file, proven before it appears.

The only module that knows both the exporter and the runtimes. The functions here are the Python
interface of the package; the command line calls them and prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tomexport.artifact import (
    N_GOLDEN,
    N_GOLDEN_TOKENS,
    RANDOM,
    TOKENS,
    Array,
    Golden,
    Metadata,
    golden_images,
)
from tomexport.delivery import check_output, publish, staging, write
from tomexport.errors import (
    BackendError,
    BuildError,
    ExportError,
    RewriteError,
    UnknownNameError,
    VerifyError,
    did_you_mean,
    need,
    require_known,
)
from tomexport.plan import Plan, Schedule
from tomexport.runtime.baselines import BOUND, NONE, beside
from tomexport.runtime.load import readers
from tomexport.runtime.verify import VerifyReport
from tomexport.runtime.verify import verify as verify_file

if TYPE_CHECKING:
    from torch import nn

    from tomexport.exporter.methods.method import Method
    from tomexport.exporter.rewrite import ReducedModel
    from tomexport.exporter.source import Source

Progress = Callable[[str], None]
DEFAULT_METHOD = "tome"
OUTPUT_KINDS = ("logits", "features", TOKENS)
_GOLDEN = "golden set"
MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 18, 23, 18


class Images(Protocol):
    """Images of the user's own, to be prepared as an exported file says."""

    def __call__(self, metadata: Metadata) -> tuple[Array, str]:
        """Return (B, channels, height, width) float32, and which images these are, in words."""
        ...


def _silent(message: str) -> None:
    del message


@dataclass(frozen=True)
class ExportReport:
    """The result of `export`.

    Attributes:
        path: the file.
        files: all files written, with their sizes in bytes.
        metadata: what the file says of itself.
        verify: the proof, or None if it was not asked for.
        notes: what the user should know.
        baselines: the same of the files that it is measured against, if they were asked for.
    """

    path: str
    files: dict[str, int]
    metadata: Metadata
    verify: VerifyReport | None
    notes: tuple[str, ...]
    baselines: tuple[ExportReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        metadata = dataclasses.asdict(self.metadata) | {"plan": self.metadata.plan.to_dict()}
        return {
            "path": self.path,
            "files": self.files,
            "notes": self.notes,
            "metadata": metadata,
            "verify": self.verify.to_dict() if self.verify else None,
            "baselines": [report.to_dict() for report in self.baselines],
        }


def plan(
    model: str | Path | nn.Module | Source,
    schedule: str,
    *,
    method: str | None = None,
    arch: str | None = None,
    img_size: tuple[int, int] | None = None,
    output_kind: str | None = None,
) -> Plan:
    """Compute the tokens and MACs of every block; a name needs no weights.

    Raises: PlanError for a schedule that cannot be, UnknownNameError, CheckpointError or
        RewriteError for a model that cannot.
    """
    wanted = Schedule.parse(schedule)  # before torch is loaded
    found = _find(model, arch=arch, img_size=img_size, with_weights=False)
    return _plan(found, wanted, method_of(found, method), output_kind)


def _find(model: str | Path | nn.Module | Source, **options: Any) -> Source:
    need("torch", "export")
    from tomexport.exporter.source import find

    return find(model, **options)


def method_of(found: Source, text: str | None) -> Method:
    """Return the method that is asked for; without a name, the one whose weights the file has.

    Raises: RewriteError if it cannot be told, UnknownNameError for a name that there is not.
    """
    from tomexport.exporter import methods

    name, colon, options = (text or "").partition(":")
    if not name and len(found.methods) > 1:
        raise RewriteError(
            f"{found.weights} holds weights that {' and '.join(found.methods)} have alike, so it "
            "does not say which of them it was trained with. Name it with --method."
        )
    known = found.methods[0] if found.methods else DEFAULT_METHOD
    method = methods.method_of(f"{name or known}{colon}{options}")
    return method.fitted(found.extras) if method.fitted else method


def _plan(found: Source, schedule: Schedule, method: Method, output_kind: str | None) -> Plan:
    from tomexport.exporter.families import family_of

    _check_output_kind(found, output_kind)
    cost = family_of(found.model).cost(found.model, found.name)
    cost = cost.without_head() if output_kind == TOKENS else cost
    return Plan.make(cost, schedule, method.name, method.counting)


def _check_output_kind(found: Source, wanted: str | None) -> None:
    """Refuse an output that there is not.

    Raises: UnknownNameError, or RewriteError for one that the model does not have.
    """
    from tomexport.exporter.families import family_of

    if wanted is not None:
        require_known("output", wanted, OUTPUT_KINDS)
    own = family_of(found.model).output(found.model)
    if wanted not in (None, TOKENS, own):
        raise RewriteError(
            f"{found.name} puts out {own}, not {wanted}: whether it has a classifier is for its "
            f"weights to say. Leave out --output, or ask for {own} or {TOKENS}."
        )


def reduce(
    model: str | Path | nn.Module | Source,
    schedule: str,
    *,
    method: str | None = None,
    prop_attn: bool = True,
    arch: str | None = None,
    img_size: tuple[int, int] | None = None,
    random_weights: int | None = None,
    permutation_seed: int | None = None,
    output_kind: str | None = None,
) -> ReducedModel:
    """Make a module with reduced tokens around the weights of a model, which stays as it was.

    Usage:
        reduced = tomexport.reduce(timm.create_model("deit_tiny_patch16_224"), "const:8")
        logits = reduced(images)  # (B, 3, H, W) → (B, classes)

    Raises: RewriteError if the model cannot be reduced correctly, and what `plan` raises.
    """
    wanted = Schedule.parse(schedule)
    found = _find(
        model, arch=arch, img_size=img_size, random_weights=random_weights,
        permutation_seed=permutation_seed,
    )  # fmt: skip
    return _reduce(found, wanted, method, prop_attn, output_kind)


def _reduce(
    found: Source, schedule: Schedule, method: str | None, prop_attn: bool,
    output_kind: str | None,
) -> ReducedModel:  # fmt: skip
    from tomexport.exporter.own_weights import own_weights
    from tomexport.exporter.rewrite import ReducedModel

    chosen = method_of(found, method)
    plan = _plan(found, schedule, chosen, output_kind)
    own = own_weights(chosen, plan, found)
    return ReducedModel(found.model, plan, chosen, prop_attn=prop_attn, own=own, output=output_kind)


def export(
    model: str | Path | nn.Module | Source,
    schedule: str,
    output: str | Path,
    *,
    method: str | None = None,
    arch: str | None = None,
    batch: int | None = 1,
    img_size: tuple[int, int] | None = None,
    opset: int | None = None,
    ops: str | None = None,
    half: bool = False,
    trace: bool = False,
    prop_attn: bool = True,
    random_weights: int | None = None,
    permutation_seed: int | None = None,
    output_kind: str | None = None,
    verify: bool = True,
    images: Images | None = None,
    force: bool = False,
    keep: bool = False,
    with_baselines: bool = False,
    progress: Progress = _silent,
) -> ExportReport:
    """Export a model with reduced tokens, and prove the file before it appears.

    Usage:
        report = tomexport.export("model.pth", "exp:0.25,0", "model.onnx")
        report.verify.passed

    Args:
        model: checkpoint file, timm name, module, or what `exporter.source.find` found.
        schedule: tokens to remove: none, const:R, linear:R, exp:R_INIT,ALPHA or list:….
        output: the file; .onnx or .xml.
        method: how tokens are chosen; None is the method whose weights the file has, or ToMe.
        arch: timm name of a checkpoint's architecture; None finds it.
        batch: images per call; None for any number.
        img_size: (height, width) in pixels; None as the weights have it.
        opset: ONNX opset; None for 18.
        ops: "custom" or "portable"; None is custom for .onnx, portable for .xml.
        half: store the weights of an .xml as float16.
        trace: give out the target map of each reduction too, (batch, N) integers: the slot that
            each token goes to, −1 for none. The outputs are called as `Metadata.decisions` says.
        prop_attn: weight keys by the patches they stand for.
        random_weights: seed for weights instead of trained ones.
        permutation_seed: seed for the orders in which SReT's second visits take their tokens;
            None is 0.
        output_kind: "tokens" for a feature of each patch; None is what the model puts out.
        verify: compare with PyTorch in every runtime that is installed.
        images: loads images of the user's own to compare on as well.
        force: replace an existing file.
        keep: leave the file even if it fails.
        with_baselines: write two more files beside it, which `profile` compares it with: STEM.none,
            nothing merged, and STEM.bound, as if merging were free.
        progress: is told what is being done.

    Raises: VerifyError if the file does not compute what PyTorch computes, ExportError if it
        cannot be written, and what `reduce` raises. Nothing is left behind.
    """
    wanted = Schedule.parse(schedule)
    output = Path(output)
    ops = _check_request(model, output, ops, batch, opset, half, force)
    for name in (NONE, BOUND) if with_baselines else ():
        check_output(model, beside(output, name), force)
    progress("finding the model")
    found = _find(
        model, arch=arch, img_size=img_size, random_weights=random_weights,
        permutation_seed=permutation_seed,
    )  # fmt: skip
    progress("planning and rewriting")
    reduced = _reduce(found, wanted, method, prop_attn, output_kind)
    progress("tracing the graph")
    from tomexport.exporter.golden import beyond_budget, record
    from tomexport.exporter.to_onnx import to_onnx

    opset = opset or DEFAULT_OPSET
    graph, decisions = to_onnx(
        reduced, batch=batch, opset=opset, portable=ops == "portable", trace=trace
    )
    progress("recording the golden set")
    golden = record(reduced, found.model, _golden_images(reduced))
    metadata = _metadata(found, reduced, batch, opset, ops, half, prop_attn, decisions)
    shown, called = images(metadata) if images else (golden.images, _GOLDEN)
    with staging(output) as folder:
        staged = folder / output.name
        progress(f"writing {output.name}")
        write(graph, metadata, golden, staged)
        del graph  # its copy of the weights: the runtimes need the room
        proof = verify_file(staged, progress=progress) if verify else None
        if proof and proof.passed and images:
            progress("computing the images with PyTorch")
            own = record(reduced, found.model, shown)
            proof = verify_file(staged, golden=own, images=called, progress=progress)
        if proof:
            proof = dataclasses.replace(proof, path=str(output))
        failed = proof is not None and not proof.passed
        if not failed or keep:
            files = publish(folder, output, force)
    if failed:
        assert proof is not None
        raise ProofError(proof, kept=keep)
    baselines = _baselines(reduced.plan.schedule, reduced.plan.method) if with_baselines else {}
    peers = tuple(
        export(
            model, other_schedule, beside(output, name), method=other_method, arch=arch,
            batch=batch, img_size=img_size, opset=opset, ops=ops, half=half, prop_attn=prop_attn,
            random_weights=random_weights, permutation_seed=permutation_seed,
            output_kind=output_kind, verify=verify, force=force, keep=keep,
            progress=progress,
        )
        for name, (other_schedule, other_method) in baselines.items()
    )  # fmt: skip
    notes = (*found.notes, *reduced.plan.notes, *beyond_budget(reduced, shown, called))
    return ExportReport(str(output), files, metadata, proof, notes, peers)


def _baselines(schedule: str, method: str) -> dict[str, tuple[str, str]]:
    """Return schedule and method of what a file is measured against, by name."""
    return {NONE: ("none", method), BOUND: (schedule, f"{BOUND}:{method}")}


class ProofError(VerifyError):
    """An export whose file does not compute what PyTorch computes.

    Attributes:
        report: the comparison.
    """

    def __init__(self, report: VerifyReport, *, kept: bool) -> None:
        self.report = report
        runs = [
            f"{run.name}, batch {run.batch}: {'; '.join(run.failures)}"
            for run in report.runs
            if not run.passed
        ]
        fate = "The file was kept." if kept else "No file was kept; --keep leaves it."
        super().__init__(
            f"{report.path} does not compute what PyTorch computes. {'. '.join(runs)}. {fate}"
        )


def reference(
    path: str | Path,
    model: str | Path | nn.Module | None,
    images: Images | None = None,
    *,
    arch: str | None = None,
) -> tuple[Golden, str]:
    """Compute with PyTorch what an exported file should compute.

    Args:
        path: the file; its plan says how to reduce the model.
        model: what it was exported from.
        images: loads the images to compare on; None draws the golden ones again.
        arch: timm name of a checkpoint's architecture; None takes the file's.

    Returns:
        What PyTorch computes, and what to call the images.

    Raises: VerifyError if the weights are not those of the file, and what `reduce` raises.
    """
    if model is None:
        raise VerifyError(
            "Comparing on images, or with another --arch, runs PyTorch again: add --against MODEL "
            "with the checkpoint or name that the file was exported from."
        )
    metadata = describe(path)
    found = _exported_from(path, metadata, model, arch)
    from tomexport.exporter.golden import record

    schedule = Schedule.parse(metadata.plan.schedule)
    kind = TOKENS if metadata.output == TOKENS else None
    reduced = _reduce(found, schedule, metadata.plan.method, metadata.prop_attn, kind)
    pixels, what = images(metadata) if images else (_golden_images(reduced), "drawn again")
    return record(reduced, found.model, pixels), what


def original(
    path: str | Path, model: str | Path | nn.Module, *, arch: str | None = None
) -> Callable[[Array], Array]:
    """Return the unmerged model of an exported file, in PyTorch.

    Args:
        path: the file.
        model: what it was exported from.
        arch: timm name of a checkpoint's architecture; None takes the file's.

    Returns:
        A function from images (B, channels, height, width) float32 to what the file puts out.

    Raises: VerifyError if the weights are not those of the file, and what `reduce` raises.
    """
    metadata = describe(path)
    found = _exported_from(path, metadata, model, arch)
    import torch

    module = found.model.eval()
    if metadata.output == TOKENS:
        module = _reduce(found, Schedule.parse("none"), DEFAULT_METHOD, metadata.prop_attn, TOKENS)

    def run(images: Array) -> Array:
        with torch.no_grad():
            outputs: Array = module(torch.from_numpy(images)).numpy()
        return outputs

    return run


def _exported_from(
    path: str | Path, metadata: Metadata, model: str | Path | nn.Module, arch: str | None
) -> Source:
    """Find the model that a file was exported from."""
    is_file = isinstance(model, (str, Path)) and Path(model).exists()
    words, _, seed = metadata.weights.rpartition(" ")
    found = _find(
        model,
        arch=arch or (metadata.names[0] if is_file and metadata.names else None),
        img_size=metadata.input_shape[2:],
        random_weights=int(seed) if words == RANDOM and not is_file else None,
        permutation_seed=metadata.permutation_seed,
    )
    if found.sha256 != metadata.weights_sha256:
        raise VerifyError(
            f"The weights of {model} are not those that {path} was exported from (their SHA-256 "
            "differ). Give the checkpoint that it was exported from, or export it again."
        )
    return found


def _golden_images(reduced: ReducedModel) -> Array:
    count = N_GOLDEN_TOKENS if reduced.output == TOKENS else N_GOLDEN
    return golden_images(reduced.input_shape, count)


def describe(path: str | Path) -> Metadata:
    """Read what an exported file says of itself.

    Raises: BackendError or ArtifactError if it is no file of tomexport's.
    """
    from tomexport.runtime.backend import read_artifact
    from tomexport.runtime.load import require_readable

    path = Path(path)
    backend = readers(path)[0]
    require_readable(path, backend)
    return read_artifact(backend, path)[0]


def _check_request(
    model: object, output: Path, ops: str | None, batch: int | None, opset: int | None,
    half: bool, force: bool,
) -> str:  # fmt: skip
    """Refuse what cannot be written before any work is done; return the ops to use."""
    check_output(model, output, force)
    if batch is not None and batch < 1:
        raise ExportError(f"A batch of {batch} holds no image; use 1 or more, or 'dynamic'.")
    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportError(f"Opset {opset} is not supported; use {MIN_OPSET} to {MAX_OPSET}.")
    if ops not in (None, "custom", "portable"):
        raise UnknownNameError(
            f"Unknown ops {ops!r}; known: custom, portable."
            f"{did_you_mean(ops, ('custom', 'portable'))}"
        )
    is_ir = output.suffix == ".xml"
    if half and not is_ir:
        raise ExportError("--half stores the weights of an .xml as float16; .onnx keeps float32.")
    if is_ir:
        need("openvino", "openvino")
    if is_ir and ops == "custom":
        require_kernels(output)
    return ops or ("portable" if is_ir else "custom")


def require_kernels(output: Path) -> None:
    """Refuse to write an IR with nodes of our own where OpenVINO could not read it.

    Raises: ExportError with the reason.
    """
    from tomexport.runtime.openvino_backend import OpenVino

    try:
        OpenVino().library()
    except (BuildError, BackendError) as err:
        raise ExportError(
            f"{output.name} with nodes of our own can be written, and read, only with fused "
            f"kernels. {err} Or use --ops portable, the default of .xml."
        ) from err


def _metadata(
    found: Source, reduced: ReducedModel, batch: int | None, opset: int, ops: str, half: bool,
    prop_attn: bool, decisions: tuple[str, ...],
) -> Metadata:  # fmt: skip
    from tomexport.exporter.zoo import preprocessing

    size = {"size": list(reduced.input_shape[1:])}  # of the weights, whatever the name's own is
    known = {name: (preprocessing(name) or {}) | size for name in found.names}
    return Metadata(
        plan=reduced.plan,
        names=found.names,
        input_shape=(batch, *reduced.input_shape),
        output=reduced.output,
        ops=ops,
        prop_attn=prop_attn,
        half=half,
        decisions=decisions,
        weights=Path(found.weights).name,
        weights_sha256=found.sha256,
        preprocessing=found.preprocessing and found.preprocessing | size,
        candidates=known if found.preprocessing is None else {},
        versions=_versions(),
        opset=opset,
        permutation_seed=getattr(found.model, "permutation_seed", None),
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("tomexport", "torch", "timm", "onnx", "onnxscript", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
