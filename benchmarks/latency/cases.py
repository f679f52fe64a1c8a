"""What is measured: models, schedules, runtimes, and how they are grouped.

A group is one interleaved measurement: all its variants take turns in every round, so that each
ratio is formed within rounds. It holds as many schedules as memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tomexport.runtime.timing import LONG_CALL_S

FUSED, PORTABLE, BOUND, NAIVE = "fused", "portable", "bound", "naive"  # one each per schedule
NONE, TIMM, SLICE = "none", "timm", "slice"
SCHEDULES = ("const:8", "const:13", "linear:13", "exp:0.25,0", "exp:0.1,0.6", "exp:0.4,0.2")
HEADLINE = ("const:8", "exp:0.25,0")  # in a group of their own where rounds are many
HEADLINE_ROUNDS, REWRITE_ROUNDS = 200, 100
HEADLINE_LAUNCHES, REWRITE_LAUNCHES = 6, 3
BATCHES = (1, 8)
TURN_S = 0.1  # of each variant, unless two calls take longer: the first calls of a turn are cold
# what can be turned off, alone, in the export
REWRITES = {
    "qkv": "q, k, v by one transposition and one Split, not a Slice each",
    "scale": "scale of the attention folded into the weights",
    "LayerScale": "LayerScale folded into the weights (of the model with LayerScale)",
    "last block": "last block computes the class token alone",
    "GELU": "GELU in the form that runtimes fuse",
    "bias": "bias of the rank of the product that it is added to",
}
# every method where it is published, at as many MACs: 2.98 to 3.03 G on the model below
METHODS = {
    **dict.fromkeys(("tome", "dtem", "pitome", "tofu", "diffrate"), "const:11"),
    **dict.fromkeys(("evit", "evit:fuse=no", "dynamicvit", "dtps", "etps"), "keep:0.7@3,6,9"),
    "evo-vit": "keep:0.5@4,8",
    **dict.fromkeys(("ats", "topk", "random"), "keep:0.7@3,6,9"),
}
METHOD_FORMS = {form for name in METHODS for form in (name, f"{BOUND}:{name}")}
METHODS_MODEL, METHODS_ROUNDS, METHODS_LAUNCHES = "deit_small_patch16_224", 60, 3
REWRITE_SCHEDULE = "const:8"  # of the bound and of the slice export that it is held against


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        name: of timm.
        gmacs: of one image, to estimate how long it will take.
        rounds: least rounds by batch.
        launches: how often the processes are launched anew, each time for a part of the rounds: two
            processes of one file can differ by some percent for as long as they live.
        at_once: schedules in one group; each variant of a large model holds up to a gigabyte.
    """

    name: str
    gmacs: float = 1.0
    rounds: tuple[tuple[int, int], ...] = ((1, 8), (8, 6))
    launches: int = 1
    at_once: int = 3


MODELS = (
    Model("deit_tiny_patch16_224", 1.3, ((1, 40), (8, 12)), launches=2, at_once=6),
    Model("deit_small_patch16_224", 4.6, ((1, 16), (8, 6)), at_once=6),
    Model("vit_base_patch16_224", 17.6),
    Model("vit_small_patch16_384", 15.5),
)


def model(name: str) -> Model:
    """Return the model of a name; any other one of timm's is measured as a base model is."""
    return next((each for each in MODELS if each.name == name), Model(name))


@dataclass(frozen=True)
class Runtime:
    """A runtime, its device, and the precision that it is asked for; None for its own."""

    name: str
    backend: str
    precision: str | None = "f32"
    device: str = "CPU"


GPU = Runtime("gpu", "onnxruntime", device="CUDA")  # PyTorch's CUDA where ONNX Runtime has none
RUNTIMES = (
    Runtime("onnxruntime", "onnxruntime"),
    Runtime("openvino", "openvino"),
    Runtime("openvino-default", "openvino", None),
    GPU,
)


@dataclass(frozen=True)
class Variant:
    """A file and how it runs.

    Attributes:
        form: FUSED, PORTABLE, BOUND, NAIVE, NONE, TIMM, SLICE; for the methods a method's name, and
            that of its bound; for the rewrites "all", which is NONE of the model with LayerScale,
            and "without …".
        schedule: what it removes; "none" for nothing.
    """

    form: str
    schedule: str = "none"

    @property
    def file(self) -> Variant:
        """The variant as its file is called: fused and portable are one file run in two ways."""
        return Variant(FUSED, self.schedule) if self.form == PORTABLE else self

    @property
    def method(self) -> str | None:
        """The method that it is exported with; None if others export it."""
        ours = {NONE: "tome", "all": "tome", FUSED: "tome", BOUND: BOUND}
        return self.form if self.form in METHOD_FORMS else ours.get(self.form)

    @property
    def merged(self) -> bool:
        """Whether fused kernels are to carry it out."""
        return self.form == FUSED or self.form in METHODS


@dataclass(frozen=True)
class Group:
    """One interleaved measurement.

    Attributes:
        part: "schedules", "methods" or "rewrites".
        model, batch, runtime: what runs, and where.
        schedules: that are compared in it, or methods.
        rounds: at least so many.
        launches: of the processes, which share the rounds.
        variants: what takes turns.
    """

    part: str
    model: Model
    batch: int
    runtime: Runtime
    schedules: tuple[str, ...]
    rounds: int
    launches: int
    variants: tuple[Variant, ...]

    @property
    def key(self) -> tuple[str, str, int, str, tuple[str, ...]]:
        """What tells it from other groups."""
        return self.part, self.model.name, self.batch, self.runtime.name, self.schedules

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return (
            f"{self.part}, {self.model.name}, batch {self.batch}, {self.runtime.name}, "
            f"{' '.join(self.schedules)}"
        )

    @property
    def estimate_s(self) -> float:
        """How long it takes on two cores that compute 75 GMACs a second each."""
        gmacs_per_s = 150 if self.runtime.precision == "f32" else 500
        call = self.model.gmacs * self.batch / gmacs_per_s
        turn = call if call >= LONG_CALL_S else max(TURN_S + 0.02, 2 * call)
        load = 0.6 + self.model.gmacs / 10
        return len(self.variants) * (self.rounds * turn + self.launches * (2 * turn + load))


def schedule_variants(schedules: Sequence[str]) -> tuple[Variant, ...]:
    """Return every form of every schedule, and what they are compared with."""
    forms = (FUSED, PORTABLE, BOUND, NAIVE)
    return (Variant(NONE), Variant(TIMM), *(Variant(f, s) for s in schedules for f in forms))


def method_variants(methods: Sequence[str]) -> tuple[Variant, ...]:
    """Return every method and its bound, and the unmerged model."""
    forms = ((form, METHODS[name]) for name in methods for form in (name, f"{BOUND}:{name}"))
    return (Variant(NONE), *(Variant(*each) for each in forms))


def rewrite_variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """Return the unmerged export with each rewrite off, and what tests the bound's honesty."""
    without = (Variant(f"without {name}") for name in names)
    compared = (Variant(BOUND, REWRITE_SCHEDULE), Variant(SLICE, REWRITE_SCHEDULE))
    return (Variant(NONE), Variant(TIMM), *without, Variant("all"), *compared)


def groups(
    models: Sequence[Model],
    batches: Sequence[int],
    schedules: Sequence[str],
    runtimes: Sequence[Runtime],
    methods: Sequence[str],
    rewrites: Sequence[str],
    rounds: int | None = None,
    launches: int | None = None,
) -> Iterator[Group]:
    """Yield all groups; the methods on one model, the rewrites on the first, both at batch 1."""
    for each in models:
        for batch in batches:
            for chunk, n_rounds, n_launches in _chunks(each, batch, schedules):
                for runtime in runtimes:
                    yield Group(
                        "schedules", each, batch, runtime, chunk, rounds or n_rounds,
                        launches or n_launches, schedule_variants(chunk),
                    )  # fmt: skip
    for runtime in runtimes:
        if methods and runtime is not GPU:
            yield Group(
                "methods", model(METHODS_MODEL), 1, runtime, tuple(methods),
                rounds or METHODS_ROUNDS, launches or METHODS_LAUNCHES, method_variants(methods),
            )  # fmt: skip
        if models and rewrites and runtime is not GPU:
            yield Group(
                "rewrites", models[0], 1, runtime, (REWRITE_SCHEDULE,),
                rounds or REWRITE_ROUNDS, launches or REWRITE_LAUNCHES, rewrite_variants(rewrites),
            )  # fmt: skip


def _chunks(
    model: Model, batch: int, schedules: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Yield the schedules of each group, its rounds and its launches."""
    rounds = dict(model.rounds).get(batch, 6)
    rest = tuple(schedules)
    if model is MODELS[0] and batch == 1:
        headline = tuple(each for each in schedules if each in HEADLINE)
        if headline:
            yield headline, HEADLINE_ROUNDS, HEADLINE_LAUNCHES
        rest = tuple(each for each in schedules if each not in HEADLINE)
    for start in range(0, len(rest), model.at_once):
        yield rest[start : start + model.at_once], rounds, model.launches
