"""What a file is compared with: its other forms, its unmerged export and its free-merge bound."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

from tomexport.artifact import IN_MEMORY, PRETRAINED, RANDOM, TOKENS, Metadata
from tomexport.errors import ArtifactError
from tomexport.runtime.backend import Backend, read_artifact
from tomexport.runtime.load import require_readable

FUSED, PORTABLE, NONE, BOUND = "fused", "portable", "none", "bound"
_CALLED = {NONE: "unmerged baseline", BOUND: "free-merge bound"}


def forms(path: Path, metadata: Metadata, kernels: str) -> dict[str, tuple[str, str]]:
    """Return the ways to run the file itself: what it is called, the file and its kernels."""
    if not _reduces(metadata):
        return {BOUND if _is_bound(metadata) else NONE: (str(path), kernels)}
    fused = {FUSED: (str(path), kernels)} if metadata.ops == "custom" and kernels != "off" else {}
    if fused and path.suffix == ".xml":
        return fused  # IR has no bodies: it cannot run in standard operators
    return fused | {PORTABLE: (str(path), "off" if fused else kernels)}


def _is_bound(metadata: Metadata) -> bool:
    return metadata.plan.method.startswith(f"{BOUND}:")


def _reduces(metadata: Metadata) -> bool:
    return metadata.plan.n_reductions > 0 and not _is_bound(metadata)


def beside(path: Path, name: str) -> Path:
    """Return where the baseline of a file lies: model.onnx has model.none.onnx."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def find(
    backend: Backend, path: Path, metadata: Metadata, given: dict[str, str | Path | None]
) -> tuple[dict[str, tuple[Path, Metadata]], list[str]]:
    """Return the files to compare with and what they say of themselves; and what is missing."""
    if not _reduces(metadata):
        if any(given.values()):
            raise ArtifactError(
                f"{path} merges no tokens, so there is nothing to compare; leave out --baseline "
                "and --bound."
            )
        return {}, ["the file merges no tokens, so there is nothing to compare it with"]
    found: dict[str, tuple[Path, Metadata]] = {}
    missing: list[str] = []
    for name, file in given.items():
        peer = Path(file) if file else beside(path, name)
        if file or peer.is_file():
            require_readable(peer, backend)
            found[name] = (peer, read_artifact(backend, peer)[0])
            _check(name, path, metadata, *found[name])
        else:
            missing.append(f"no {_CALLED[name]}: there is no {peer.name} beside the file")
    if missing:
        if metadata.quantization:
            missing.append("quantize --with-baselines writes what is missing")
        else:
            command = _export_command(path, metadata)
            missing.append(f"export --with-baselines writes what is missing{command}")
    return found, missing


def _check(name: str, path: Path, ours: Metadata, peer: Path, theirs: Metadata) -> None:
    n_removed, wanted = ([step.removed for step in m.plan.steps] for m in (theirs, ours))
    same: dict[str, tuple[object, object]] = {
        "format": (peer.suffix, path.suffix),
        "SHA-256 of the weights": (theirs.weights_sha256[:16], ours.weights_sha256[:16]),
        "input shape": (theirs.input_shape, ours.input_shape),
        "output": (theirs.output, ours.output),
        "storage as float16": (theirs.half, ours.half),
        "permutation seed": (theirs.permutation_seed, ours.permutation_seed),
        "precision": (_precision(theirs), _precision(ours)),
    }
    if name == NONE:
        same["number of tokens removed"] = (sum(n_removed), 0)
    else:
        same["method"] = (theirs.plan.method, f"{BOUND}:{ours.plan.method}")
        same["list of tokens removed"] = (n_removed, wanted)
        same["proportional attention"] = (theirs.prop_attn, ours.prop_attn)
    for what, (found, needed) in same.items():
        if found != needed:
            raise ArtifactError(
                f"{peer} cannot be the {_CALLED[name]} of {path}: its {what} is {found}, and "
                f"{needed} is needed. Export both anew with --with-baselines."
            )


def _precision(metadata: Metadata) -> str:
    return "int8" if metadata.quantization else "float"


def _export_command(path: Path, metadata: Metadata) -> str:
    """Return the command that exports a file with its baselines, where that is known."""
    words, _, seed = metadata.weights.rpartition(" ")
    name = metadata.names[0] if metadata.names else ""
    exporter = all(importlib.util.find_spec(module) for module in ("torch", "timm"))
    if not exporter or metadata.weights == IN_MEMORY:
        return ""
    model = [metadata.weights, *(["--arch", name] if name else [])]
    order_seed = metadata.permutation_seed
    if words == RANDOM:
        model = [name, "--random-weights", seed]
    elif metadata.weights == PRETRAINED:
        model = [name]
    batch, _, height, width = metadata.input_shape
    options = [
        "--schedule", metadata.plan.schedule, "--method", metadata.plan.method,
        "--ops", metadata.ops, "--opset", f"{metadata.opset}", "--batch", f"{batch or 'dynamic'}",
        "--img-size", f"{height}x{width}", *(["--half"] if metadata.half else []),
        *([] if metadata.prop_attn else ["--no-prop-attn"]),
        *(["--output", TOKENS] if metadata.output == TOKENS else []),
        *(["--permutation-seed", f"{order_seed}"] if order_seed else []),
    ]  # fmt: skip
    return f": {shlex.join(['tomexport', *model, *options])} -o {path} --with-baselines --force"
