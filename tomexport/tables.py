"""Reports as tables for people. JSON for machines comes from the reports' own `to_dict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tomexport.calib.evaluate import Accuracy, Evaluated, EvaluateReport
from tomexport.calib.fidelity import Estimate, in_words
from tomexport.calib.quantize import QuantizeReport
from tomexport.calib.report.report import Report
from tomexport.calib.search.search import SearchReport
from tomexport.calib.show import Shown
from tomexport.kernels.cache import Library
from tomexport.pipeline import ExportReport
from tomexport.plan import Plan
from tomexport.runtime.doctor import Diagnosis
from tomexport.runtime.profile import ProfileReport, Run, Variant, percent, times
from tomexport.runtime.timing import Interval
from tomexport.runtime.verify import VerifyReport

if TYPE_CHECKING:  # it loads torch
    from tomexport.calib.learn.learn import LearnReport


def _table(*columns: str, title: str | None = None) -> Table:
    """Make a table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def plan_table(plan: Plan) -> RenderableType:
    """Show tokens and MACs of every block, and the totals."""
    table = _table(
        "block", *(("call", "multiple") if plan.staged else ()),
        "tokens in", "requested", "removed", "tokens out", "MMACs", "share",
        title=f"{plan.model}, {plan.method}, {plan.schedule}",
    )  # fmt: skip
    for step in plan.steps:
        removed = f"{step.removed}" if step.removed == step.requested else f"{step.removed} *"
        place = (f"{step.stage}.{step.call}", f"{step.multiple}") if plan.staged else ()
        table.add_row(
            step.block,
            *place,
            f"{step.tokens_in}",
            f"{step.requested}",
            removed,
            f"{step.tokens_out}{f' → {step.restored}' if step.restored else ''}",
            f"{step.macs / 1e6:.1f}",
            f"{step.macs / plan.macs:.1%}",
        )
    rest = plan.macs - sum(step.macs for step in plan.steps)
    blank = [""] * (len(table.columns) - 3)
    name = "stem, pools and head" if plan.staged else "stem and head"
    table.add_row(name, *blank, f"{rest / 1e6:.1f}", f"{rest / plan.macs:.1%}")
    summary = (
        f"removed {plan.removed_total} tokens in all; {plan.macs / 1e9:.3f} GMACs of "
        f"{plan.macs_unreduced / 1e9:.3f} unreduced; predicted speed-up "
        f"{plan.predicted_speedup:.2f}×"
    )
    slides = (
        f"GFLOPs without attention products, norms included (as thop counts them): "
        f"{plan.flops_slides / 1e9:.3f} of {plan.flops_slides_unreduced / 1e9:.3f}"
    )
    notes = [Text(f"* {note}") for note in plan.notes]
    if plan.macs_spared:
        spared = (
            f"{plan.macs_spared / 1e9:.3f} GMACs of these are not computed: the head reads the "
        )
        notes.append(
            Text(f"{spared}class token alone, so the last block computes no other (exact)")
        )
    return Group(table, Text(summary), Text(slides), *notes)


def verify_table(report: VerifyReport) -> RenderableType:
    """Show each runtime's difference from PyTorch, and what merging itself changes."""
    n_images = report.runs[0].images if report.runs else 0
    device = f" on {report.runs[0].device}" if report.runs else ""
    table = _table(
        "runtime", "batch", "max |Δ|", "mean", "cosine", "top-1", "flips", "",
        title=f"{report.path}{device} against PyTorch, {n_images} images ({report.images})",
    )  # fmt: skip
    for run in report.runs:
        verdict = ("pass" if run.passed else "FAIL") if run.gated else "info"
        otherwise = f"{run.decided_otherwise} of {run.images}"
        table.add_row(
            run.name,
            f"{run.batch}",
            f"{run.max_abs:.1e}",
            f"{run.mean_abs:.1e}",
            f"{run.cosine:.6f}",
            "–" if run.top1 is None else f"{run.top1:.0%}",
            otherwise,
            Text(verdict, style={"pass": "green", "FAIL": "bold red"}.get(verdict, "dim")),
        )
    failures = [
        Text(f"{run.name}, batch {run.batch}: {failure}")
        for run in report.runs
        if not run.passed
        for failure in run.failures
    ]
    ties = [
        Text(
            f"{run.name}, batch {run.batch}: {run.near_ties} of these images "
            "part at a near tie of PyTorch's own choice"
        )
        for run in report.runs
        if run.gated and run.near_ties
    ]
    fidelity = report.fidelity
    top1 = "" if fidelity.top1 is None else f", top-1 agreement {fidelity.top1:.0%}"
    merging = (
        f"merging itself, in PyTorch, against the original: max |Δ| {fidelity.max_abs:.1e}, "
        f"mean {fidelity.mean_abs:.1e}, cosine {fidelity.cosine:.4f}{top1}"
    )
    return Group(table, *failures, *ties, Text(merging))


def profile_table(report: ProfileReport) -> RenderableType:
    """Show each run: its variants, what can be said of them, and where the time goes."""
    parts: list[RenderableType] = [
        Text(f"{report.path}: {report.model}, {report.method}, {report.schedule}")
    ]
    for run in report.runs:
        parts += [Text(""), _run_table(run), Text(run.verdict)]
        if run.variants[0].operators:
            parts += [Text(""), _operators_table(run.variants[0])]
        if run in report.failures:
            text = f"FAIL: the speed-up is below {report.min_speedup:g}×"
            parts.append(Text(text, style="bold red"))
    return Group(*parts)


def _run_table(run: Run) -> RenderableType:
    cpus = f" on CPUs {', '.join(map(str, run.cpus))}" if run.cpus else ""
    threads = f", {run.threads} threads{cpus}" if run.threads else ""
    table = _table("", "ms", "p20", "p90", "p99", "MiB", "speed-up", "over bound", "µs/merge")
    table.collapse_padding = True  # intervals are wide where a machine is not quiet
    for each in run.variants:
        table.add_row(
            each.name,
            *(f"{time:.2f}" for time in (each.median_ms, each.p20_ms, each.p90_ms, each.p99_ms)),
            f"{each.peak_memory / 2**20:.0f}" if each.peak_memory else "–",
            times(each.speedup) if each.speedup else "",
            percent(each.overhead) if each.overhead else "",
            _whole(each.us_per_merge) if each.us_per_merge else "",
        )
    name = f"{run.backend} {run.device} {run.precision}, batch {run.batch}"
    counts = f"{run.rounds} rounds, {run.launches} launches"
    return Group(Text(f"{name}{threads}, {counts}"), table)


def _whole(figure: Interval) -> str:
    return f"{figure.value:.0f} ({figure.low:.0f}–{figure.high:.0f})"


def _operators_table(variant: Variant, n_rows: int = 8) -> RenderableType:
    total = sum(each.microseconds for each in variant.operators)
    merging = sum(each.microseconds for each in variant.operators if each.merging)
    table = _table("operator", "part", "count", "mean µs", "share")
    for each in variant.operators[:n_rows]:
        table.add_row(
            each.type,
            "merging" if each.merging else "network",
            f"{each.count}",
            f"{each.microseconds / max(each.count, 1):.1f}",
            f"{each.microseconds / total:.1%}",
        )
    heading = f"operators of {variant.name}, {total / 1000:.2f} ms as profiled"
    return Group(Text(f"{heading}: merging {merging / total:.1%}"), table)


def evaluate_table(report: EvaluateReport) -> RenderableType:
    """Show accuracy, and likeness to the unmerged model, of each run: a line for each figure."""
    table = _table(
        "", "", "", title=f"{report.path}: {report.model}, {report.method}, {report.schedule}"
    )
    table.show_header = False
    table.columns[1].justify = "left"
    rows = [(run.name, _figures(run), run.failures) for run in report.runs]
    if report.reference_accuracy:
        rows.insert(0, ("unmerged", _accuracy(report.reference_accuracy), ()))
    for name, figures, failures in rows:
        for what, figure in figures.items():
            table.add_row(name, what, figure)
            name = ""
        if failures:
            table.add_row("", Text("FAIL", style="bold red"), "")
    n = report.runs[0].images
    labelled = f", {report.n_labelled} with labels" if report.n_labelled else ""
    lines = [f"{n} images ({report.images}){labelled}; in brackets 95 % intervals"]
    if report.reference:
        lines.append(f"unmerged: {report.reference}")
    lines += [f"kept from an earlier run: {run.n_kept} of {run.images} images, {run.name}"
              for run in report.runs if run.n_kept]  # fmt: skip
    lines += [f"skipped: {each.why}" for each in report.skipped]
    lines += [f"{run.name}: {failure}" for run in report.runs for failure in run.failures]
    return Group(table, *map(Text, lines))


def _figures(run: Evaluated) -> dict[str, str]:
    """Return what was measured of a run, by name."""
    figures = _accuracy(run.accuracy)
    if run.change:
        figures["top-1 above unmerged"] = _share(run.change.top1, "+")
    if like := run.likeness:
        figures |= {"agreement with unmerged": _share(like.top1)} if like.top1 else {}
        figures |= {"KL, nats": in_words(like.kl)} if like.kl else {}
        figures["cosine"] = in_words(like.cosine)
    return figures


def _accuracy(found: Accuracy | None) -> dict[str, str]:
    if found is None:
        return {}
    return {"top-1": _share(found.top1)} | ({"top-5": _share(found.top5)} if found.top5 else {})


def _share(found: Estimate, sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.1f}" for bound in (found.low, found.high))
    return f"{100 * found.value:{sign}.1f}% ({low}–{high})"


def shown_table(shown: Shown) -> RenderableType:
    """Show what became of the patches in each layer that was drawn."""
    gone = "waiting" if shown.frames[0].waiting else "dropped"
    table = _table(
        "block", "layer", "tokens", "patches", "merged", gone,
        title=f"{shown.artifact} on {shown.image}, {shown.backend} {shown.precision}",
    )  # fmt: skip
    for frame in shown.frames:
        counts = (frame.layer, frame.tokens, frame.groups.size, frame.merged, frame.gone)
        table.add_row(frame.block, *map(str, counts))
    return Group(table, Text(f"saved: {shown.picture} ({_kib(shown.size)})"))


def report_summary(report: Report) -> RenderableType:
    """Show where a page was put, and whether its file is right."""
    verdict = "computes" if report.passed else "does NOT compute"
    return Group(
        Text(f"{report.artifact} {verdict} what PyTorch computes ({report.verify.images})"),
        Text(f"saved: {report.path} ({_kib(report.size)})"),
    )


def quantize_table(report: QuantizeReport) -> RenderableType:
    """Show an int8 file beside its source."""
    names = ("top-1", "top-5") if report.before else ()
    table = _table("", "MiB", *names, "ms", "precision",
                   title=f"{report.path}, int8 by {report.tool}")  # fmt: skip
    speed, after = report.speed, report.after
    rows = (
        (report.source, report.size_before, report.before,
         speed and (speed.before_ms, speed.before_precision)),
        (report.path, sum(report.files.values()), after.accuracy,
         speed and (speed.after_ms, f"int8, {speed.after_precision}")),
    )  # fmt: skip
    for path, size, accuracy, timed in rows:
        ms, precision = (f"{timed[0]:.2f}", timed[1]) if timed else ("–", "–")
        shown = _accuracy(accuracy)
        cells = [shown.get(name, "–") for name in names]
        table.add_row(path, f"{size / 2**20:.1f}" if size else "–", *cells, ms, precision)
    lines = [
        f"calibrated on {report.n_calibrated} images, judged on {after.images} ({report.judged})",
        f"nodes that stay float, because they choose tokens or merge them: {report.kept_float}",
    ]
    if like := after.likeness:
        agreement = f"first class kept {_share(like.top1)}, " if like.top1 else ""
        kl = f"KL {in_words(like.kl)}, " if like.kl else ""
        lines.append(f"beside its float32 self: {agreement}{kl}cosine {in_words(like.cosine)}")
    lines += [f"skipped: {each.why}" for each in report.skipped]
    lines += [f"FAIL: {failure}; nothing was written" for failure in after.failures]
    files = [pair for r in (report, *report.baselines) for pair in r.files.items()]
    lines += [f"saved: {file} ({size / 2**20:.1f} MiB)" for file, size in files]
    return Group(verify_table(report.verify), table, *map(Text, (*lines, report.verdict)))


def export_summary(report: ExportReport) -> RenderableType:
    """Show what was written, and its proof."""
    plan = report.metadata.plan
    parts: list[RenderableType] = []
    if report.verify:
        parts.append(verify_table(report.verify))
    parts.append(
        Text(
            f"{plan.schedule}: {_tokens(plan)}, "
            f"{plan.macs / 1e9:.3f} of {plan.macs_unreduced / 1e9:.3f} GMACs"
        )
    )
    for file, size in [pair for r in (report, *report.baselines) for pair in r.files.items()]:
        parts.append(Text(f"saved: {file} ({size / 2**20:.1f} MiB)"))
    return Group(*parts)


def _tokens(plan: Plan) -> str:
    if plan.staged:
        return f"{plan.removed_total} tokens removed over all stages"
    return f"{plan.steps[0].tokens_in} → {plan.steps[-1].tokens_out} tokens"


def built_table(libraries: Sequence[Library]) -> RenderableType:
    """Show where libraries were put."""
    return Group(*(Text(f"built: {lib.path} ({_kib(lib.size)})") for lib in libraries))


def libraries_table(folder: Path, libraries: Sequence[tuple[Library, bool]]) -> RenderableType:
    """Show what the cache of kernels holds, and which of it sessions here use."""
    if not libraries:
        return Text(f"{folder} holds no kernels yet; the first session builds them")
    table = _table("runtime", "version", "march", "size", "built (UTC)", "", title=str(folder))
    for library, used in libraries:
        table.add_row(
            library.runtime,
            library.version,
            library.march,
            "–" if library.error else _kib(library.size),
            library.built[:16].replace("T", " "),
            "failed" if library.error else "in use" if used else "",
        )
    failures = [
        Text(f"{lib.runtime} {lib.version}: {lib.error}") for lib, _ in libraries if lib.error
    ]
    return Group(table, *failures)


def cleaned(folder: Path, count: int, size: int) -> RenderableType:
    """Show what was removed from the cache of kernels."""
    libraries = "library" if count == 1 else "libraries"
    return Text(f"removed {count} {libraries} ({_kib(size)}) from {folder}")


def _kib(size: int) -> str:
    return f"{size / 1024:.0f} KiB"


def doctor_table(diagnosis: Diagnosis) -> RenderableType:
    """Show machine, packages, runtimes and tools."""
    rows: dict[str, Mapping[str, object]] = {
        "machine": diagnosis.machine,
        "packages": diagnosis.packages,
        "runtimes": diagnosis.runtimes,
        "kernels": diagnosis.kernels,
        "tools": diagnosis.tools,
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for section, entries in rows.items():
        table.add_row(section, "")
        for name, value in entries.items():
            table.add_row(f"  {name}", _words(value))
    return table


def _words(value: object) -> str:
    if value is None:
        return "not found"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {', '.join(map(str, items))}" for name, items in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def learn_table(report: LearnReport) -> RenderableType:
    """Show what learning changed, on the images held out, and its verdict."""
    table = _table(
        "schedule", "tokens left", "GMACs", "agree with unmerged", "KL", "top-1",
        title=f"{report.path}: {report.model}, learned at {report.schedule} from "
        f"{report.n_learned} images, judged on {report.n_held_out} others",
    )  # fmt: skip
    verdicts = []
    for judged in report.judgements:
        top1 = [f"{100 * each.value:.1f} %" for each in judged.accuracy]
        for i, (name, likeness) in enumerate([("tome", judged.before), ("dtem", judged.after)]):
            assert likeness.top1
            assert likeness.kl
            table.add_row(
                f"{judged.schedule}, {name}", f"{judged.counts[-1]}", f"{judged.gmacs[i]:.3f}",
                _percent_within(likeness.top1), _within(likeness.kl), top1[i + 1] if top1 else "–",
            )  # fmt: skip
        verdicts.append(
            Text(
                f"{judged.schedule}: {judged.verdict} (agreement "
                f"{_percent_within(judged.agreement, '+')}, KL {_within(judged.kl, '+')}; "
                "paired, 95 %)"
            )
        )
    unmerged = report.judgements[0]
    whole = f"unmerged: {unmerged.gmacs[2]:.3f} GMACs"
    if unmerged.accuracy:
        whole += f", top-1 {100 * unmerged.accuracy[0].value:.1f} %"
    learned = report.learned
    steps = f"{learned.steps} steps in {learned.seconds:.0f} s, last loss {learned.loss:.4f}"
    return Group(table, Text(whole), Text(steps), *verdicts)


def _percent_within(estimate: Estimate, sign: str = "") -> str:
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]"


def _within(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.4f} [{estimate.low:{sign}.4f}, {estimate.high:{sign}.4f}]"


def search_table(report: SearchReport) -> RenderableType:
    """Show what nothing beats, and what was chosen of it."""
    table = _table(
        "schedule", "method", "precision", "GMACs", "ms", "speed-up", "loss", "held out", ""
    )
    n_best = sum(report.front)
    title = (
        f"{report.model} on {report.images}; {n_best} of {len(report.points)} points that no other "
        "beats"
    )
    for index, point in enumerate(report.points):
        if not report.front[index] and index != report.chosen:
            continue
        table.add_row(
            point.schedule, point.method, point.precision, f"{point.gmac:.3f}",
            f"{report.latency_ms(point):.2f}", f"{1 / point.ratio.value:.2f}×",
            f"{point.loss:.1%}", f"{point.held_out_loss:.1%}",
            Text("chosen" if index == report.chosen else "", style="green"),
        )  # fmt: skip
    unmerged = (
        f"unmerged, float32: {report.unmerged['latency_ms']:.2f} ms; the loss is {report.loss}"
    )
    fate = f"{report.path}: {report.rule}" if report.path else f"No point is {report.rule}."
    return Group(Text(title), table, Text(unmerged), Text(fate))
