"""The whole way: model and images → embeddings → checkpoint, judged on images held out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tomexport.artifact import Array
from tomexport.calib import fidelity
from tomexport.calib.fidelity import Estimate, Likeness
from tomexport.calib.images import PLAIN, PREPARED, ImageSet, prepare
from tomexport.calib.learn.embedding import KEY, attach, checkpoint, starting_from_keys, write
from tomexport.calib.learn.lessons import Lessons
from tomexport.calib.learn.soft import SOFT
from tomexport.calib.learn.train import Course, Learned, train
from tomexport.delivery import check_file, publish, staging
from tomexport.errors import ExportError, ImageError, LearnError, RewriteError
from tomexport.exporter import zoo
from tomexport.exporter.families import family_of
from tomexport.exporter.methods.dtem import DTEM
from tomexport.exporter.methods.method import Method
from tomexport.exporter.methods.tome import TOME
from tomexport.exporter.rewrite import ReducedModel
from tomexport.exporter.source import Source, find
from tomexport.plan import Plan, Schedule

SUFFIXES = (".safetensors", ".pth")
DEFAULT_SCHEDULE = "const:16"  # the paper trains so, and runs at any
LOGITS, LABELS = "logits", "labels"
N_EPOCHS = 10
_HELD_OUT = 0.25
_BATCH = 16


@dataclass(frozen=True)
class Judgement:
    """A schedule before and after learning, on the images held out.

    Attributes:
        schedule: what is removed.
        counts: tokens after each block, the same before and after.
        gmacs: of ToMe, of DTEM (whose embedding costs a little), and of nothing merged.
        before, after: likeness of ToMe and of DTEM to the unmerged model.
        agreement: by how much more images agree, paired.
        kl: by how much the divergence changed, paired; below zero is better.
        accuracy: top-1 by the labels, unmerged, before and after; empty without labels.
    """

    schedule: str
    counts: tuple[int, ...]
    gmacs: tuple[float, float, float]
    before: Likeness
    after: Likeness
    agreement: Estimate
    kl: Estimate
    accuracy: tuple[Estimate, ...]

    @property
    def verdict(self) -> str:
        """What learning did here, in words."""
        if self.kl.high < 0 and self.agreement.high >= 0:
            return "learning helps"
        if self.kl.low > 0 or self.agreement.high < 0:
            return "learning harms: keep plain ToMe"
        return f"no difference that {self.kl.n} images show: keep plain ToMe"


@dataclass(frozen=True)
class LearnReport:
    """The result of `learn`.

    Attributes:
        path: the checkpoint.
        model: what it was learned from.
        schedule: what was removed while learning.
        targets: "logits" or "labels".
        images: which images, in words.
        n_learned, n_held_out: how many of them it learned from, and was judged on.
        course: how long and how fast.
        learned: what training says of itself.
        judgements: before and after, per schedule.
        skipped: images that could not be read, and why.
        labels: where labels are from, and why they were left aside, in words.
        module: the model, carrying its embeddings: `tomexport.export` takes it.
    """

    path: str
    model: str
    schedule: str
    targets: str
    images: str
    n_learned: int
    n_held_out: int
    course: Course
    learned: Learned
    judgements: tuple[Judgement, ...]
    skipped: Mapping[str, str]
    labels: tuple[str, ...]
    module: nn.Module = field(repr=False, compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how it went."""
        notes = [*self.labels]
        if self.learned.resumed_at:
            notes.append(f"went on from step {self.learned.resumed_at}")
        if self.skipped:
            name, why = next(iter(self.skipped.items()))
            notes.append(f"{len(self.skipped)} images could not be read; the first: {name}: {why}")
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["module"]
        judgements = [dataclasses.asdict(j) | {"verdict": j.verdict} for j in self.judgements]
        return fields | {
            "course": dataclasses.asdict(self.course),
            "learned": dataclasses.asdict(self.learned),
            "judgements": judgements,
            "skipped": dict(self.skipped),
            "labels": list(self.labels),
            "notes": list(self.notes),
        }


def _silent(message: str) -> None:
    del message


def learn(
    model: str | Path | nn.Module,
    images: ImageSet,
    output: str | Path,
    *,
    schedule: str = DEFAULT_SCHEDULE,
    judge: Sequence[str] = (),
    targets: str = LOGITS,
    course: Course | None = None,
    dim: int | None = None,
    arch: str | None = None,
    how: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[str], None] = _silent,
) -> LearnReport:
    """Learn by what a model should compare its tokens, from images; the model itself stays.

    DTEM's embedding starts as the keys that ToMe compares, and learns, by soft grouping, to change
    the model's outputs less. A quarter of the images is held out, and both are compared on it.

    Usage:
        images = ImageSet.find(Path("photos"))
        report = learn("model.pth", images, "learned.safetensors", schedule="const:13")
        tomexport.export("learned.safetensors", "const:13", "model.onnx")  # with method dtem

    What is done so far is kept in OUTPUT.state; the same call goes on from it, to the same result.

    Args:
        model: checkpoint file, timm name or module; a plain vision transformer.
        images: what to learn from, and to be judged on.
        output: the checkpoint to write, in DTEM's layout; .safetensors or .pth.
        schedule: what is removed while learning.
        judge: further schedules to compare at.
        targets: "logits", the unmerged model's, or "labels".
        course: how long and how fast; None is ten passes.
        dim: features of the embedding; None is as many as a head has.
        arch: timm name of a checkpoint's architecture; None finds it.
        how: crop_mode, crop_pct, interpolation, mean and std of the images; None is as timm has
            them.
        force: replace an existing checkpoint.
        progress: is told step, loss, images per second and time left.

    Raises: LearnError if it cannot be learned so, RewriteError if the model is none that learns,
        ImageError if there is too little to learn from, PlanError for a schedule.
    """
    course, output = course or Course(epochs=N_EPOCHS), Path(output)
    _check_output(output, force, model)
    wanted = [Schedule.parse(text) for text in dict.fromkeys([schedule, *judge])]
    found = find(model, arch=arch)
    model_ = _frozen(found)
    images = images.classed(model_.num_classes)
    learners, held_out = _split(images, course.seed, targets)
    if dim is not None and dim < 1:
        raise LearnError(f"--dim {dim} holds nothing; use 1 or more, or leave it out.")
    how = how or found.preprocessing or _first_known(found) or PLAIN
    embeddings = [
        starting_from_keys(block.attn, dim or block.attn.head_dim, course.seed + i)
        for i, block in enumerate(model_.blocks)
    ]
    dtem = _dtem(embeddings)
    plans = [(_plan(model_, found, s, TOME), _plan(model_, found, s, dtem)) for s in wanted]
    if not plans[0][1].removed_total:
        raise LearnError(f"{schedule} removes nothing from {found.name}, so nothing would learn.")
    soft = _reduced(model_, plans[0][1], SOFT, embeddings)
    shape, skipped = soft.input_shape, dict[str, str]()
    teacher = model_ if targets == LOGITS else None
    learned = train(
        soft,
        Lessons(learners, shape, how, course, teacher, skipped),
        course,
        len(learners),
        state=state_of(output),
        request=_request(found, learners, wanted[0], targets, course, dim, how),
        skipped=skipped,
        progress=progress,
    )
    progress(f"comparing on {len(held_out)} images held out")
    models = [
        _reduced(model_, plan, method, embeddings)
        for pair in plans
        for plan, method in zip(pair, (TOME, dtem), strict=True)
    ]
    (original, *outputs), labels = _watched([model_, *models], held_out, shape, how, skipped)
    judgements = tuple(
        _judge(*pair, original, outputs[2 * i], outputs[2 * i + 1], labels)
        for i, pair in enumerate(plans)
    )
    with staging(output) as folder:
        architecture = found.names[0] if len(found.names) == 1 else None
        write(checkpoint(model_, embeddings), architecture, folder / output.name)
        publish(folder, output, force)
    state_of(output).unlink(missing_ok=True)
    attach(model_, embeddings)
    return LearnReport(
        str(output), found.name, wanted[0].text, targets, images.description,
        sum(name not in skipped for name in learners.names), len(original), course, learned,
        judgements, skipped, images.notes, model_,
    )  # fmt: skip


def state_of(output: Path) -> Path:
    """Return the file in which training keeps what is done so far."""
    return output.with_name(f"{output.name}.state")


def _check_output(output: Path, force: bool, model: object) -> None:
    if output.suffix not in SUFFIXES:
        raise ExportError(
            f"{output.name}: a checkpoint is a {' or '.join(SUFFIXES)}, not {output.suffix!r}."
        )
    check_file(output, output.suffix, "a checkpoint", force)
    is_there = isinstance(model, (str, Path)) and Path(model).exists() and output.exists()
    if is_there and output.samefile(str(model)):
        raise LearnError(f"Writing {output.name} would replace the model; name another file.")


def _frozen(found: Source) -> Any:
    """Copy a model that can learn; nothing in it does."""
    if found.extras:
        raise RewriteError(
            f"{found.weights} holds weights of {' or '.join(found.methods)} already; learn from "
            "the checkpoint that it was trained from."
        )
    family = family_of(found.model)
    if "normed" not in family.signals:
        raise RewriteError(
            f"{found.name} is of the family {family.name!r}, whose attention does not give what it "
            "projects, which is what dtem embeds. Plain vision transformers of timm can learn."
        )
    if family.output(found.model) != "logits":
        raise RewriteError(
            f"{found.name} has no classifier, so there are no logits to learn from; give it one."
        )
    return copy.deepcopy(found.model).requires_grad_(False).eval()


def _dtem(embeddings: Sequence[nn.Linear]) -> Method:
    """Return the method with embeddings of their width, which its MACs count."""
    assert DTEM.fitted
    return DTEM.fitted({f"blocks.{i}.{KEY}.bias": each.bias for i, each in enumerate(embeddings)})


def _plan(model: nn.Module, found: Source, schedule: Schedule, method: Method) -> Plan:
    cost = family_of(model).cost(model, found.name)
    return Plan.make(cost, schedule, method.name, method.counting)


def _reduced(
    model: nn.Module, plan: Plan, method: Method, embeddings: Sequence[nn.Linear]
) -> ReducedModel:
    own = [
        layer if method.weights and step.removed else None
        for layer, step in zip(embeddings, plan.steps, strict=True)
    ]
    return ReducedModel(model, plan, method, own=own)


def _split(images: ImageSet, seed: int, targets: str) -> tuple[ImageSet, ImageSet]:
    """Hold a quarter of the images out."""
    if targets not in (LOGITS, LABELS):
        raise LearnError(f"Unknown targets {targets!r}; known: {LABELS}, {LOGITS}.")
    if targets == LABELS and (images.labels is None or None in images.labels):
        raise ImageError(
            f"Not every image of {images.source} has a label, so labels cannot be the targets. "
            "Name a csv with --labels, or learn from the unmerged model: --targets logits."
        )
    if len(images) < 8:
        raise ImageError(
            f"{images.source} holds {len(images)} images; learning takes 8 at least, of which a "
            "quarter is held out."
        )
    order = np.random.default_rng(seed).permutation(len(images))
    n_held_out = round(len(images) * _HELD_OUT)
    learners, held_out = sorted(order[n_held_out:].tolist()), sorted(order[:n_held_out].tolist())
    return images.take(learners), images.take(held_out)


def _first_known(found: Source) -> Mapping[str, Any] | None:
    return zoo.preprocessing(found.names[0]) if found.names else None


def _request(
    found: Source, learners: ImageSet, schedule: Schedule, targets: str, course: Course,
    dim: int | None, how: Mapping[str, Any],
) -> dict[str, str]:  # fmt: skip
    """Return all that decides what is learned."""
    labels = hashlib.sha256(str(learners.labels).encode()).hexdigest()
    return {
        "model": found.sha256[:12],
        "images": learners.digest(range(len(learners)))[:12],
        "schedule": schedule.text,
        "targets": targets,
        **({"labels": labels[:12]} if targets == LABELS else {}),
        "dim": str(dim),
        "preparation": ", ".join(f"{k} {how.get(k, PLAIN[k])}" for k in sorted(PLAIN)),
        "prepared": str(PREPARED),
        **{name: str(value) for name, value in dataclasses.asdict(course).items()},
    }


def _watched(
    models: Sequence[nn.Module], images: ImageSet, shape: tuple[int, int, int],
    how: Mapping[str, Any], skipped: dict[str, str],
) -> tuple[list[Array], Array | None]:  # fmt: skip
    """Return each model's outputs, (N, classes), and the labels if all images have one."""
    read, outputs = [], []
    for start in range(0, len(images), _BATCH):
        pixels = []
        for i in range(start, min(start + _BATCH, len(images))):
            try:
                pixels.append(prepare(images.open(i), shape, how))
                read.append(i)
            except ImageError as err:
                skipped[images.names[i]] = str(err)
        if pixels:
            batch = torch.from_numpy(np.stack(pixels))
            with torch.no_grad():
                outputs.append([model(batch).numpy() for model in models])
    if not read:
        raise ImageError(
            f"None of the {len(images)} images held out could be read. The first: "
            f"{skipped[images.names[0]]}"
        )
    labels = None if images.labels is None else [images.labels[i] for i in read]
    known = None if labels is None or None in labels else np.array(labels)
    return [np.concatenate(each) for each in zip(*outputs, strict=True)], known


def _judge(
    tome: Plan, dtem: Plan, original: Array, before: Array, after: Array, labels: Array | None
) -> Judgement:
    first = original.argmax(axis=1)
    agreement = fidelity.difference(fidelity.hits(after, first), fidelity.hits(before, first))
    kl = fidelity.divergences(original, after) - fidelity.divergences(original, before)
    accuracy = () if labels is None else tuple(
        fidelity.share(fidelity.hits(each, labels)) for each in (original, before, after)
    )  # fmt: skip
    return Judgement(
        tome.schedule,
        tuple(step.tokens_out for step in tome.steps),
        (tome.macs / 1e9, dtem.macs / 1e9, tome.macs_unreduced / 1e9),
        fidelity.likeness(original, before),
        fidelity.likeness(original, after),
        agreement,
        fidelity.mean(kl),
        accuracy,
    )
