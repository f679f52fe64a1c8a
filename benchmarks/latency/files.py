"""The files that are measured, kept in a folder so that a rerun need not export them again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tomexport
from benchmarks.latency import peers, rewrites
from benchmarks.latency.cases import METHOD_FORMS, NAIVE, SLICE, TIMM, Group, Variant
from tomexport.artifact import golden_images
from tomexport.exporter.weights import seed_weights
from tomexport.exporter.zoo import timm

SEED = 0
_LAYER_SCALE = ("without LayerScale", "all")  # forms of the model with LayerScale
_WRITERS = ("torch", "timm", "onnxscript", "onnx-ir")


@lru_cache(maxsize=2)
def module(name: str, layer_scale: bool = False) -> nn.Module:
    """Build a timm model with seeded weights."""
    options = {"init_values": 1.0} if layer_scale else {}
    return seed_weights(timm().create_model(name, **options), SEED).eval()


def peer(model: nn.Module, form: str, schedule: str) -> nn.Module:
    """Return the module that a peer computes with: timm's own, naive ToMe, or sliced."""
    if form == TIMM:
        return model
    removed = [step.removed for step in tomexport.plan(model, schedule).steps]
    return peers.patched(model, removed, {NAIVE: peers.merge, SLICE: peers.cut}[form])


def images(model: nn.Module, batch: int) -> torch.Tensor:
    """Return the images that are measured on: (batch, channels, height, width)."""
    shape = tomexport.reduce(model, "none").input_shape
    return torch.from_numpy(golden_images(shape, batch))


def path(folder: Path, group: Group, variant: Variant) -> Path:
    """Return where the file of a variant lies."""
    what = variant.file
    words = f"{group.model.name} {group.batch} {what.form} {what.schedule}"
    return folder / f"{words.replace(' ', '_').replace(':', '')}.onnx"


def write(folder: Path, group: Group, progress: Callable[[str], None]) -> None:
    """Export what a group needs and is not there yet."""
    for variant in group.variants:
        target = path(folder, group, variant)
        if not target.exists():
            progress(f"exporting {target.name}")
            staged = target.with_name(f"staged-{target.name}")
            _export(variant.file, group, staged)
            os.replace(staged, target)


def _export(variant: Variant, group: Group, target: Path) -> None:
    form, schedule = variant.form, variant.schedule
    options: dict[str, Any] = {"batch": group.batch, "method": variant.method, "force": True}
    if variant.form in METHOD_FORMS:  # by name: so a method's own weights are seeded, too
        name = group.model.name
        tomexport.export(name, schedule, target, verify=False, random_weights=SEED, **options)
        return
    model = module(group.model.name, form in _LAYER_SCALE)
    if variant.method:
        tomexport.export(model, schedule, target, verify=False, **options)
    elif form.startswith("without "):
        rewrites.export_without(form.removeprefix("without "), model, group.batch, target)
    else:
        peers.to_onnx(peer(model, form, schedule), images(model, group.batch), target)


def fresh(folder: Path) -> bool:
    """Make the folder, without files that other sources or libraries wrote.

    Returns:
        Whether such files were removed.
    """
    mark, now = folder / "sources.txt", sources("*.py")
    stale = folder.exists() and any(folder.iterdir())
    if stale and not mark.exists():
        raise SystemExit(f"{folder} holds other things; name a folder of its own with --work")
    stale = stale and mark.read_text() != now
    if stale:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(now)
    return stale


def sources(*patterns: str) -> str:
    """Hash what the files depend on: exporter, operators, peers and libraries.

    Args:
        patterns: which files of the package; "*.py" is enough for what is exported.
    """
    package, here = Path(tomexport.__file__).parent, Path(__file__).parent
    folders = (package / "exporter", package / "kernels")
    code = {file for folder in folders for pattern in patterns for file in folder.rglob(pattern)}
    code |= {package / "plan.py", package / "pipeline.py", package / "delivery.py"}
    code |= {here / "peers.py", here / "rewrites.py", here / "files.py"}
    code |= {here.parent / "slides/recursive.py"}
    digest = hashlib.sha256()
    for file in sorted(code):
        digest.update(file.read_bytes())
    digest.update(repr([importlib.metadata.version(name) for name in _WRITERS]).encode())
    return digest.hexdigest()[:16]
