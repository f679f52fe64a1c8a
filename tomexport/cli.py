"""The command line: parse, one library call, print. No logic.

Imports of libraries that take long stand inside the commands, so that --help is quick.
"""

from __future__ import annotations

import difflib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tomexport import __version__, scratch
from tomexport import options as option
from tomexport.errors import TomexportError, VerifyError
from tomexport.terminal import progressing, show_notes, show_result

EXIT_DONE, EXIT_CHECK_FAILED, EXIT_ERROR = 0, 1, 2


class _ExportByDefault(click.Group):
    """`tomexport MODEL …` is `tomexport export MODEL …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names, "--version"):
            near = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if near and not Path(args[0]).exists():
                raise click.UsageError(f"No command {args[0]!r}. Did you mean {near[0]!r}?", ctx)
            args = ["export", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ExportByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tomexport")
def cli() -> None:
    """Put token-reduced vision transformers on edge machines.

    \b
    tomexport MODEL --schedule S -o OUT     export (the default command)
    tomexport plan MODEL --schedule S       tokens and MACs, nothing exported
    tomexport verify FILE                   compare a file with PyTorch
    tomexport profile FILE                  what merging costs and saves in it
    tomexport evaluate FILE --images DIR    how right it is, and how like the unmerged model
    tomexport learn MODEL --images DIR      merge by what was learned from images
    tomexport search MODEL --images DIR …   the fastest file that loses little enough
    tomexport show FILE IMAGE -o PNG        which patches it merges
    tomexport report FILE -o HTML           all of this on one page
    tomexport quantize FILE -o OUT          int8, and what that loses and gains
    tomexport kernels build|list|clean      the fused kernels of this machine
    tomexport doctor                        what this machine has

    MODEL is a checkpoint (.pth .pt .bin .safetensors .pth.tar .torch .npz) or a name, timm's or of
    SReT (sret_t). Exit codes: 0 done, 1 a check failed, 2 anything else that stops it, 130
    interrupted.
    """  # noqa: D301  \b is click's mark for lines that stay as they are


@cli.command()
@click.argument("model")
@option.listed(
    option.schedule,
    option.out("OUT", "File to write: .onnx, or .xml for OpenVINO IR."),
    option.arch,
    option.method,
    option.output_kind,
    click.option("--ops", metavar="custom|portable", help=(
        "custom: nodes of our own with standard bodies (.onnx, default); "
        "portable: standard operators only (.xml, default)."
    )),
    click.option("--batch", type=option.Batch(), default="1", show_default=True,
                 help="Images per call."),
    option.img_size,
    click.option("--opset", type=int, help="ONNX opset, 18 or newer.  [default: 18]"),
    click.option("--half", is_flag=True, help="Store the weights of an .xml as float16."),
    click.option("--trace", is_flag=True, help=(
        "Give out where tokens went as well: outputs decision_0, …, one for each reduction."
    )),
    click.option("--random-weights", type=int, metavar="SEED",
                 help="Seeded weights instead of trained ones, for trials with a name."),
    click.option("--permutation-seed", type=int, metavar="SEED", help=(
        "Draw the token orders of SReT's second visits from this.  [default: 0]"
    )),
    click.option("--no-prop-attn", is_flag=True,
                 help="Do not weight keys by the patches they stand for."),
    option.images,
    click.option("--no-verify", is_flag=True, help="Do not compare the file with PyTorch."),
    click.option("--force", is_flag=True, help="Replace an existing file."),
    click.option("--keep", is_flag=True, help="Leave the file even if it fails."),
    click.option("--with-baselines", is_flag=True,
                 help="Write what profile compares it with, too: STEM.none and STEM.bound."),
    option.as_json,
    option.debug,
)  # fmt: skip
def export(
    model: str, images: Path | None, limit: int, no_verify: bool, no_prop_attn: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Export MODEL with reduced tokens, and prove the file."""
    from tomexport import pipeline
    from tomexport.calib.images import ImageSet

    with progressing() as progress:
        report = pipeline.export(
            model,
            options.pop("schedule"),
            options.pop("output"),
            verify=not no_verify,
            prop_attn=not no_prop_attn,
            images=ImageSet.find(images, limit) if images else None,
            progress=progress,
            **option.with_method(options),
        )
    show_notes(report.notes)
    show_result(report.to_dict(), as_json, lambda tables: tables.export_summary(report))


@cli.command()
@click.argument("model")
@option.listed(
    option.schedule,
    option.arch,
    option.method,
    option.output_kind,
    option.img_size,
    option.as_json,
    option.debug,
)
def plan(model: str, as_json: bool, **options: Any) -> None:
    """Show the tokens and MACs of every block of MODEL. A name needs no weights."""
    from tomexport import pipeline

    result = pipeline.plan(model, options.pop("schedule"), **option.with_method(options))
    width = 100 if result.staged else 80
    show_result(result.to_dict(), as_json, lambda tables: tables.plan_table(result), width)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@option.listed(
    click.option("--backend", metavar="NAME",
                 help="onnxruntime or openvino; all that are installed if left out."),
    click.option("--device", default="CPU", show_default=True, help="Device of the runtime."),
    click.option("--precision", metavar="f32|bf16|f16",
                 help="Only this one; f32 and the runtime's default if left out."),
    option.kernels,
    click.option("--against", metavar="MODEL",
                 help="Run PyTorch again, on the checkpoint or name it was exported from."),
    option.images,
    option.arch,
    option.as_json,
    option.debug,
)  # fmt: skip
def verify(
    artifact: Path, against: str | None, images: Path | None, limit: int, arch: str | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Compare ARTIFACT with PyTorch: with its golden set, or again on real images."""
    from tomexport.runtime import verify as verification

    with progressing() as progress:
        if against or images or arch:
            from tomexport import pipeline
            from tomexport.calib.images import ImageSet

            golden, what = pipeline.reference(
                artifact, against, ImageSet.find(images, limit) if images else None, arch=arch
            )
            options |= {"golden": golden, "images": what}
        report = verification.verify(artifact, progress=progress, **options)
    show_result(report.to_dict(), as_json, lambda tables: tables.verify_table(report))
    if not report.passed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@option.listed(
    click.option("--backend", "backends", multiple=True, metavar="NAME", help=(
        "onnxruntime or openvino, or both; all that are installed and can if left out."
    )),
    click.option("--precision", "precisions", multiple=True, metavar="f32|bf16|f16",
                 help="One or more; f32 and the runtime's default if left out."),
    click.option("--device", default="CPU", show_default=True, help=(
        "CPU, CUDA or TENSORRT of onnxruntime; CPU, GPU or NPU of openvino."
    )),
    click.option("--batch", "batches", multiple=True, type=int, metavar="N",
                 help="Images per call, one or more, for files of dynamic batch.  [default: 1]"),
    click.option("--threads", type=int, metavar="N",
                 help="CPU threads, kept on as many CPUs; all if left out."),
    click.option("--rounds", default=20, show_default=True, metavar="N",
                 help="Time at least so many turns of each variant."),
    click.option("--launches", default=3, show_default=True, metavar="N", help=(
        "Launch the processes so often, each time for a part of the rounds: two processes of one "
        "file can differ by some percent for as long as they live."
    )),
    click.option("--seconds", default=20.0, show_default=True, metavar="T",
                 help="Time each runtime, precision and batch for at least so long."),
    click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE",
                 help="The unmerged export; STEM.none.SUFFIX beside the file if left out."),
    click.option("--bound", type=click.Path(path_type=Path), metavar="FILE",
                 help="The free-merge bound; STEM.bound.SUFFIX beside the file if left out."),
    option.kernels,
    click.option("--no-operators", is_flag=True, help="Do not ask the runtimes' own profilers."),
    click.option("--min-speedup", type=float, metavar="X",
                 help="Exit with 1 if merging speeds up any run by less than this."),
    click.option("--png", type=click.Path(path_type=Path), metavar="FILE",
                 help="Draw a chart of the latencies."),
    click.option("--force", is_flag=True, help="Replace an existing chart."),
    option.as_json,
    option.debug,
)  # fmt: skip
def profile(
    artifact: Path, no_operators: bool, png: Path | None, force: bool, as_json: bool, **options: Any
) -> None:
    """Measure what merging costs and saves in ARTIFACT, beside its unmerged export and its bound.

    `export --with-baselines` writes both beside the file.
    """
    from tomexport import chart
    from tomexport.runtime import profile as profiling

    if png:
        chart.check(png, force=force)
    with progressing() as progress:
        report = profiling.profile(
            artifact, operators=not no_operators, progress=progress, **options
        )
    show_notes(report.notes)
    show_result(report.to_dict(), as_json, lambda tables: tables.profile_table(report), width=100)
    if png:
        chart.draw(report, png)
    if not report.passed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@option.listed(
    *option.image_set,
    click.option("--backend", "backends", multiple=True, metavar="NAME", help=(
        "onnxruntime or openvino, or both; all that are installed if left out."
    )),
    click.option("--precision", "precisions", multiple=True, metavar="f32|bf16|f16",
                 help="One or more; f32 and the runtime's default if left out."),
    click.option("--device", default="CPU", show_default=True, help="Device of the runtime."),
    option.kernels,
    click.option("--batch", type=int, metavar="N",
                 help="Images per call, for a file of dynamic batch.  [default: 8]"),
    click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE",
                 help="The unmerged export; STEM.none.SUFFIX beside the file if left out."),
    click.option("--against", metavar="MODEL",
                 help="Run the unmerged model in PyTorch: the checkpoint or name it is from."),
    option.arch,
    click.option("--min-top1", type=float, metavar="SHARE",
                 help="Exit with 1 if fewer images have their label as first class."),
    click.option("--min-agreement", type=float, metavar="SHARE",
                 help="Exit with 1 if fewer images have the unmerged model's first class."),
    option.as_json,
    option.debug,
)  # fmt: skip
def evaluate(
    artifact: Path, images: Path, limit: int | None, seed: int, labels: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Measure how right ARTIFACT is on images, and how like the unmerged model.

    A run that is stopped goes on where it was when it is started again.
    """
    from tomexport.calib.evaluate import evaluate as measure
    from tomexport.calib.images import ImageSet

    with progressing() as progress:
        found = ImageSet.find(images, limit, seed, labels)
        report = measure(artifact, found, progress=progress, **options)
    show_notes(report.notes)
    show_result(report.to_dict(), as_json, lambda tables: tables.evaluate_table(report))
    if not report.passed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


@cli.command()
@click.argument("model")
@option.listed(
    *option.image_set,
    option.out("OUT", "Checkpoint to write: .safetensors or .pth."),
    click.option("--schedule", default="const:16", show_default=True, metavar="S",
                 help="Tokens to remove while learning; any other can be exported afterwards."),
    click.option("--judge", multiple=True, metavar="S",
                 help="Compare at this schedule too; one or more."),
    click.option("--targets", default="logits", show_default=True, metavar="logits|labels",
                 help="Come near to the unmerged model's logits, or to the labels."),
    click.option("--epochs", type=int, metavar="N", help="Passes over the images.  [default: 10]"),
    click.option("--minutes", type=float, metavar="T", help="Or about so long."),
    click.option("--lr", default=1e-3, show_default=True, metavar="X",
                 help="AdamW's learning rate at the start; it falls along a cosine."),
    click.option("--batch", default=16, show_default=True, metavar="N", help="Images per step."),
    click.option("--dim", type=int, metavar="N",
                 help="Features of the embedding; as many as a head has if left out."),
    option.arch,
    click.option("--force", is_flag=True, help="Replace an existing checkpoint."),
    option.as_json,
    option.debug,
)  # fmt: skip
def learn(
    model: str, images: Path, output: Path, labels: str | None, limit: int | None, as_json: bool,
    epochs: int | None, minutes: float | None, lr: float, batch: int, seed: int, **options: Any,
) -> None:  # fmt: skip
    """Learn from images by what MODEL should compare its tokens, for --method dtem.

    The model itself stays as it is. A quarter of the images is held out, to judge by. Interrupted,
    the same command goes on where it was, to the same result.
    """
    from tomexport.calib.images import ImageSet
    from tomexport.calib.learn import learn as learning
    from tomexport.calib.learn.train import Course

    if epochs is None and minutes is None:
        epochs = learning.N_EPOCHS
    course = Course(epochs, minutes, lr, batch, seed)
    found = ImageSet.find(images, limit, seed, labels)
    with progressing() as progress:
        report = learning.learn(model, found, output, course=course, progress=progress, **options)
    show_notes(report.notes)
    show_result(report.to_dict(), as_json, lambda tables: tables.learn_table(report), width=100)


@cli.command()
@click.argument("model")
@option.listed(
    *option.image_set[:2],
    click.option("--limit", default=1000, show_default=True, metavar="N",
                 help="Draw so many of the images, where there are more."),
    option.image_set[3],
    option.out("OUT", "File to write: .onnx, or .xml for OpenVINO IR."),
    click.option("--held-out", type=click.Path(path_type=Path), metavar="DIR|FILE.npz", help=(
        "Images to hold out, to see whether it holds elsewhere.  [default: half of --images]"
    )),
    click.option("--max-drop", type=float, metavar="SHARE", help=(
        "Take the fastest that loses at most so much: top-1 accuracy, or agreement with the "
        "unmerged model where there are no labels."
    )),
    click.option("--max-latency-ms", type=float, metavar="X",
                 help="Take nothing slower; without --max-drop, what then loses least."),
    click.option("--max-gmac", type=float, metavar="G",
                 help="Take nothing with more multiply-accumulates, in 10⁹."),
    click.option("--method", "methods", multiple=True, metavar="NAME",
                 help="How tokens are chosen, one or more.  [default: tome]"),
    click.option("--family", "families", multiple=True, metavar="none|const|linear|exp|keep|list",
                 help="Kinds of schedules, one or more; all if left out."),
    click.option("--precision", "precisions", multiple=True, metavar="f32|bf16|int8",
                 help="One or more.  [default: f32]"),
    click.option("--trials", type=int, metavar="N", help=(
        "Stop when so many points are measured, those in the storage included.  [default: 40, or "
        "no limit with --minutes]"
    )),
    click.option("--minutes", type=float, metavar="M", help="Begin no trial after so long."),
    click.option("--storage", metavar="FILE.journal|URL", help=(
        "Keep trials there, to go on with and to share with other processes and machines: a file, "
        "or a database that SQLAlchemy knows."
    )),
    click.option("--seconds", default=4.0, show_default=True, metavar="T",
                 help="Time each point for at least so long."),
    click.option("--evaluations", type=int, metavar="N", help=(
        "Lists of counts to compute for each method and share of MACs.  [default: 60]"
    )),
    option.arch,
    click.option("--backend", metavar="NAME",
                 help="onnxruntime or openvino; the first that reads OUT if left out."),
    click.option("--threads", type=int, metavar="N",
                 help="CPU threads, kept on as many CPUs; all if left out."),
    option.kernels,
    click.option("--front", type=click.Path(path_type=Path), metavar="FILE.json",
                 help="Write all that was measured, and what nothing beats."),
    click.option("--png", type=click.Path(path_type=Path), metavar="FILE",
                 help="Draw loss over latency."),
    click.option("--force", is_flag=True, help="Replace existing files."),
    option.as_json,
    option.debug,
)  # fmt: skip
def search(
    model: str, images: Path, labels: str | None, limit: int, seed: int, output: Path,
    held_out: Path | None, front: Path | None, png: Path | None, force: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Find the schedule, method and precision that fit MODEL, this machine and the images best.

    Half of the images are searched on, those held out say whether it holds elsewhere.
    """
    from tomexport import chart
    from tomexport.calib.images import ImageSet
    from tomexport.calib.search.search import search as find_best
    from tomexport.delivery import check_file, write_file

    if png:
        chart.check(png, force=force)
    if front:
        check_file(front, ".json", "a front", force)
    chosen = {name: value for name, value in options.items() if value not in (None, ())}
    with progressing() as progress:
        found = ImageSet.find(images, limit, seed, labels)
        aside = labels if labels == "none" else None
        others = ImageSet.find(held_out, limit, seed, aside) if held_out else None
        report = find_best(
            model, found, output, held_out=others, seed=seed, force=force, progress=progress,
            **chosen,
        )  # fmt: skip
    show_notes(report.notes)
    show_result(report.to_dict(), as_json, lambda tables: tables.search_table(report), width=110)
    if front:
        content = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        write_file(front, f"{content}\n".encode(), force)
    if png:
        chart.draw_front(report, png)
    if not report.passed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@option.listed(
    option.out("PNG", "Picture to write."),
    click.option("--layers", default="all", show_default=True, metavar="all|final|0,4,11", help=(
        "What to draw: all block calls that remove tokens, the last one, or those named."
    )),
    click.option("--backend", metavar="NAME",
                 help="onnxruntime or openvino; the first that is installed if left out."),
    click.option("--device", default="CPU", show_default=True, help="Device of the runtime."),
    click.option("--precision", metavar="f32|bf16|f16",
                 help="What to compute in; the runtime's default if left out."),
    option.kernels,
    click.option("--force", is_flag=True, help="Replace an existing picture."),
    option.as_json,
    option.debug,
)  # fmt: skip
def show(artifact: Path, image: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Draw over IMAGE which patches ARTIFACT merges and drops, block by block."""
    from tomexport.calib import show as showing

    with progressing() as progress:
        shown = showing.show(artifact, image, output, progress=progress, **options)
    show_result(shown.to_dict(), as_json, lambda tables: tables.shown_table(shown))


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@option.listed(
    option.out("HTML", "Page to write."),
    click.option("--images", type=click.Path(path_type=Path), metavar="DIR", help=(
        "Show merging on four of these images; on drawn ones if left out."
    )),
    click.option("--profile", type=click.Path(path_type=Path), metavar="FILE",
                 help="What profile --json wrote; timed here and now if left out."),
    click.option("--front", type=click.Path(path_type=Path), metavar="FILE",
                 help="The front that search wrote, to choose from."),
    click.option("--evaluation", type=click.Path(path_type=Path), metavar="FILE",
                 help="What evaluate --json wrote."),
    click.option("--seconds", default=3.0, show_default=True, metavar="T",
                 help="Time each runtime and precision for so long, without --profile."),
    click.option("--threads", type=int, metavar="N",
                 help="CPU threads to time with, without --profile; all if left out."),
    click.option("--force", is_flag=True, help="Replace an existing page."),
    option.as_json,
    option.debug,
)  # fmt: skip
def report(artifact: Path, images: Path | None, as_json: bool, **options: Any) -> None:
    """Write a page on ARTIFACT: plan, parity, latency, operators, merged patches, choices."""
    from tomexport.calib.images import ImageSet
    from tomexport.calib.report import report as reporting

    found = ImageSet.find(images, limit=reporting.N_IMAGES) if images else None
    with progressing() as progress:
        written = reporting.report(artifact, images=found, progress=progress, **options)
    show_result(written.to_dict(), as_json, lambda tables: tables.report_summary(written))
    if not written.passed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@option.listed(
    option.out("OUT", "File to write: .xml by NNCF for OpenVINO, .onnx by ONNX Runtime."),
    *option.image_set[:2],
    click.option("--limit", default=300, show_default=True, metavar="N", help=(
        "Calibrate on so many images; up to 500 others judge the file."
    )),
    click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of that draw."),
    click.option("--min-agreement", type=float, metavar="SHARE", help=(
        "Exit with 1, and write nothing, if fewer images keep their first class."
    )),
    click.option("--no-timing", is_flag=True, help="Do not time both files."),
    click.option("--with-baselines", is_flag=True,
                 help="Quantize STEM.none and STEM.bound, beside the file, alike."),
    click.option("--force", is_flag=True, help="Replace an existing file."),
    option.as_json,
    option.debug,
)  # fmt: skip
def quantize(
    artifact: Path, output: Path, images: Path, labels: str | None, no_timing: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Write ARTIFACT in int8, and measure what that loses and gains.

    What chooses tokens stays float32, and fused kernels run as before.
    """
    from tomexport.calib.images import ImageSet
    from tomexport.calib.quantize import quantize as make

    with progressing() as progress:
        found = ImageSet.find(images, None, 0, labels)
        report = make(artifact, found, output, timed=not no_timing, progress=progress, **options)
    show_notes(report.notes)
    show_result(report.to_dict(), as_json, lambda tables: tables.quantize_table(report))
    if not report.passed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


@cli.group()
def kernels() -> None:
    """Build, list or remove the fused kernels, which make merging cheap on a CPU.

    Sessions build them by themselves when they are first needed. TOMEXPORT_KERNELS=off turns them
    off, TOMEXPORT_CACHE says where they lie (~/.cache/tomexport if left out).
    """


@kernels.command("build")
@option.listed(
    click.option("--runtime", "runtimes", multiple=True, metavar="NAME",
                 help="onnxruntime or openvino, or both; all that are installed if left out."),
    click.option("--march", default="native", show_default=True, metavar="ARCH",
                 help="Architecture as the compiler names it: armv8.2-a, x86-64-v3, …"),
    click.option("--toolchain", type=click.Path(path_type=Path), metavar="FILE",
                 help="CMake's toolchain file, to build for another machine."),
    click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
                 help="Put the library there, to take it to another machine."),
    option.as_json,
    option.debug,
)  # fmt: skip
def build_kernels(runtimes: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Build the kernels anew, for this machine or for another one."""
    from tomexport.runtime.libraries import build_libraries

    built = build_libraries(runtimes, **options)
    data = {"libraries": [library.to_dict() for library in built]}
    show_result(data, as_json, lambda tables: tables.built_table(built))


@kernels.command("list")
@option.listed(option.as_json, option.debug)
def list_kernels(as_json: bool) -> None:
    """Show the kernels in the cache, and which of them are in use here."""
    from tomexport.kernels import cache
    from tomexport.runtime.libraries import stored_libraries

    stored = stored_libraries()
    entries = [library.to_dict() | {"in_use": used} for library, used in stored]
    data = {"cache": str(cache.folder()), "libraries": entries}
    show_result(data, as_json, lambda tables: tables.libraries_table(cache.folder(), stored))


@kernels.command("clean")
@option.listed(option.as_json, option.debug)
def clean_kernels(as_json: bool) -> None:
    """Remove all kernels from the cache."""
    from tomexport.kernels import cache

    count, size = cache.clean()
    data = {"cache": str(cache.folder()), "removed": count, "bytes": size}
    show_result(data, as_json, lambda tables: tables.cleaned(cache.folder(), count, size))


@cli.command()
@option.listed(option.as_json, option.debug)
def doctor(as_json: bool) -> None:
    """Show what this machine has: processor, packages, runtimes, devices, fused kernels."""
    from tomexport.runtime.doctor import diagnose

    result = diagnose()
    show_result(result.to_dict(), as_json, lambda tables: tables.doctor_table(result))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors become one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    scratch.farewell(scratch.NOTHING)
    with _ending_at_once():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        code = cli.main(arguments, prog_name="tomexport", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_DONE
    except click.exceptions.NoArgsIsHelpError as err:
        click.echo(err.format_message(), err=True)
        return EXIT_ERROR
    except click.UsageError as err:
        command = err.ctx.command_path if err.ctx else "tomexport"
        message = err.format_message()
        stop = "" if message.endswith((".", "?")) else "."
        click.echo(f"error: {message}{stop} See {command} --help.", err=True)
        return EXIT_ERROR
    except SystemExit:  # click's way out when the reader of stdout is gone
        return EXIT_ERROR
    except (TomexportError, OSError) as err:
        if "--debug" in arguments:
            traceback.print_exc()
        else:
            click.echo(f"error: {err}", err=True)
        return EXIT_CHECK_FAILED if isinstance(err, VerifyError) else EXIT_ERROR


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let an interrupt end the process on the spot, with nothing left behind.

    An exception would not do: raised while a native library loads, it aborts the process.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, _end) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    scratch.abandon()
    show_cursor = b"\x1b[?25h\n" if sys.stderr.isatty() else b""
    os.write(2, show_cursor + f"interrupted; {scratch.last_words()}\n".encode())
    os._exit(128 + number)
