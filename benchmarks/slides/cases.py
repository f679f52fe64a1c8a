"""What is measured: the slides' models, schedules and batches, and what they published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.latency import cases
from benchmarks.latency.cases import BOUND, FUSED, GPU, NONE, Group, Model, Runtime, Variant
from benchmarks.slides import recursive

RUNTIMES = tuple(runtime for runtime in cases.RUNTIMES if runtime is not GPU)
BATCHES = (1, 8, 32)
SRET = "sret_t"
_ROUNDS = ((1, 60), (8, 18), (32, 12))
MODELS = (
    Model(SRET, 1.1, ((1, 90), *_ROUNDS[1:]), launches=3),
    Model(recursive.ORIGINAL, 1.3, _ROUNDS, launches=2),
    Model(recursive.NAME, 1.3, _ROUNDS, launches=2),
)
PARTS = ("schedules", "sweep")


@dataclass(frozen=True)
class Published:
    """What the slides say of SReT-T-distilled on their GPU.

    Attributes:
        top1: ImageNet, in percent.
        gflops: of one image, by their convention.
        mib: peak memory in float32 at batch 128.
        speedup: images/s over the baseline's; they give it of one schedule.
    """

    top1: float
    gflops: float
    mib: float
    speedup: float | None = None


BASELINE = Published(77.42, 1.91, 795.76)
PUBLISHED = {
    "const:10": Published(71.01, 1.32, 769.79),
    "const:20": Published(41.06, 1.06, 756.22),
    "linear:10": Published(74.64, 1.46, 756.22),
    "linear:20": Published(14.87, 1.07, 729.46),
    "exp:0.10,0.6": Published(76.35, 1.61, 664.75),
    "exp:0.25,0": Published(75.95, 1.49, 489.48, 1.276),
    "exp:0.40,0.2": Published(69.71, 1.13, 391.51),
}
SCHEDULES = tuple(PUBLISHED)
RECURSIVE_SCHEDULES = ("const:10", "linear:10", "exp:0.25,0")  # enough to see whether it carries
BOUNDED = ("const:10", "exp:0.25,0")  # also as if merging were free: SReT-T at batch 1
SHARES = (0.10, 0.25, 0.40)  # r_init of the sweep
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8)
SWEEP_ROUNDS, SWEEP_LAUNCHES = 40, 2


def swept(share: float, alpha: float) -> str:
    """Return a schedule of the sweep."""
    return f"exp:{share:.2f},{alpha:g}"


def variant(schedule: str) -> tuple[str, str]:
    """Return form and schedule of the variant that stands for a schedule."""
    return (NONE if schedule == "none" else FUSED), schedule


SWEEP = tuple(swept(share, alpha) for share in SHARES for alpha in ALPHAS)


def groups(
    models: Sequence[Model],
    batches: Sequence[int],
    schedules: Sequence[str],
    runtimes: Sequence[Runtime],
    parts: Sequence[str] = PARTS,
    rounds: int | None = None,
    launches: int | None = None,
) -> Iterator[Group]:
    """Yield all groups; the sweep is of SReT-T at batch 1 in float32."""
    for model in models if "schedules" in parts else ():
        for batch in batches:
            for runtime in runtimes:
                least = dict(model.rounds).get(batch, _ROUNDS[-1][1])
                count = model.launches if batch == 1 else min(2, model.launches)
                chosen = of(model, schedules)
                yield Group(
                    "schedules", model, batch, runtime, chosen, rounds or least,
                    launches or count, _variants(model, batch, chosen),
                )  # fmt: skip
    for model in models if "sweep" in parts else ():
        for runtime in runtimes:
            if model.name == SRET and runtime.precision == "f32":
                yield Group(
                    "sweep", model, 1, runtime, SWEEP, rounds or SWEEP_ROUNDS,
                    launches or SWEEP_LAUNCHES, _merged(SWEEP),
                )  # fmt: skip


def of(model: Model, schedules: Sequence[str]) -> tuple[str, ...]:
    """Return which schedules are measured on a model."""
    if model.name != recursive.NAME:
        return tuple(schedules)
    return tuple(each for each in schedules if each in RECURSIVE_SCHEDULES)


def _merged(schedules: Sequence[str]) -> tuple[Variant, ...]:
    return tuple(Variant(*variant(schedule)) for schedule in ("none", *schedules))


def _variants(model: Model, batch: int, schedules: Sequence[str]) -> tuple[Variant, ...]:
    bounded = BOUNDED if model.name == SRET and batch == 1 else ()
    bounds = (Variant(BOUND, schedule) for schedule in schedules if schedule in bounded)
    return (*_merged(schedules), *bounds)
