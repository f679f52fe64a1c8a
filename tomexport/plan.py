"""Schedules and token plans: every token count known before anything runs.

Pure arithmetic on integers, no torch. A `Schedule` is what the user asked for, a `Site` is
one call of a block, a `Step` is what happens at a site, a `Plan` is the steps and their cost.

Sources: ToMe (Bolya et al., ICLR 2023) for constant and linear schedules and for the cap of
half the tokens; SReT + ToMe for the exponential schedule and for aligned counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tomexport.errors import PlanError

_COUNT_LIMIT = 1_000_000  # more tokens than any image model has; larger is a typing error
_FORMS = (
    "none, const:R, linear:R, exp:R_INIT,ALPHA, list:R0,R1,…, keep:SHARE@BLOCK,… or "
    "diffrate:FILE.json"
)
BETWEEN, BEFORE = "between", "before"  # attention and MLP; the block

# (tokens, prefix tokens) → the most tokens that a method can remove at a site
Limit = Callable[[int, int], int]
# (share, tokens met, site) → the tokens left, prefix included
Keep = Callable[[float, int, "Site"], int]


def two_set_limit(tokens: int, n_prefix: int) -> int:
    """Return the most tokens that two-set matching can remove: half of the mergeable ones."""
    return max(0, (tokens - n_prefix) // 2)


def all_but_one(tokens: int, n_prefix: int) -> int:
    """Return the most tokens that a method can remove which needs one to be left."""
    return max(0, tokens - n_prefix - 1)


def keep_of_met(share: float, tokens: int, site: Site) -> int:
    """Return the tokens left if a share of the mergeable ones met is kept, rounded up."""
    return site.n_prefix + math.ceil(share * (tokens - site.n_prefix))


def keep_of_first(share: float, tokens: int, site: Site) -> int:
    """Return the tokens left if a share of the mergeable ones at first is kept, rounded down."""
    del tokens
    return site.n_prefix + int((site.tokens_first - site.n_prefix) * share)


@dataclass(frozen=True)
class Counting:
    """How a method turns a schedule into counts, and what it costs itself.

    Attributes:
        limit: the most tokens it can remove at a site.
        keep: what a share means.
        powers: whether a single share stands for itself, its square, its cube … at the places of a
            keep schedule, rather than for itself at each.
        place: where tokens are removed: BETWEEN attention and MLP, or BEFORE the block.
        waits: whether tokens that are removed wait, and come back where the next ones are removed
            and at the end.
        macs: (site, tokens met) → MACs of linear layers of the method's own, where it acts.
        note: what the reader of any plan should know of the counts.
    """

    limit: Limit
    keep: Keep = keep_of_met
    powers: bool = False
    place: str = BETWEEN
    waits: bool = False
    macs: Callable[[Site, int], int] = lambda site, tokens: 0
    note: str = ""

    def shares(self, values: Sequence[float], n_places: int) -> tuple[float, ...]:
        """Return the share at each place of a keep schedule."""
        if len(values) == n_places:
            return tuple(values)
        return tuple(values[0] ** (i + 1 if self.powers else 1) for i in range(n_places))


TWO_SET = Counting(two_set_limit)


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one block call, as integers to be multiplied by token counts.

    Attributes:
        before: per token that enters the block (projections of the attention).
        pair: per pair of tokens that attend to each other (the attention products).
        after: per token that leaves the reduction (the MLP).
        query: the part of `before` that a token does without if nothing reads its result: query
            and output projection, not key and value.
        slices: into how many equal runs the tokens are cut; attention stays inside each.
        norm_before, norm_after: elements that are normalised, per token that enters or leaves.
        keys: how many keys each token attends to, where they are of the whole grid; None where they
            are of the tokens.
        fixed: what no token count changes (convolutions on the whole grid, keys and values of it).
        fixed_query: the part of `fixed` that is done without if only prefix tokens are read.
        norm_fixed: elements that are normalised whatever the token counts.
    """

    before: int
    pair: int
    after: int
    query: int = 0
    slices: int = 1
    norm_before: int = 0
    norm_after: int = 0
    keys: int | None = None
    fixed: int = 0
    fixed_query: int = 0
    norm_fixed: int = 0

    def macs(self, tokens_in: int, tokens_out: int) -> int:
        """Return the MACs of a block that reduces between attention and MLP."""
        pairs = tokens_in * self._keys(tokens_in) // self.slices
        each = self.before * tokens_in + self.pair * pairs + self.after * tokens_out
        return each + self.fixed

    def flops_slides(self, tokens_in: int, tokens_out: int) -> int:
        """Return the FLOPs of the same by the convention of `Plan.flops_slides`."""
        products = self.before * tokens_in + self.after * tokens_out + self.fixed
        elements = self.norm_before * tokens_in + self.norm_after * tokens_out + self.norm_fixed
        return _flops_slides(products, elements)

    def spared(self, tokens_in: int, tokens_out: int, n_read: int) -> int:
        """Return the MACs of those that are spared if only n_read tokens are read afterwards."""
        per_token = self.query + self.pair * self._keys(tokens_in)
        each = per_token * (tokens_in - n_read) + self.after * (tokens_out - n_read)
        return each + self.fixed_query

    def _keys(self, tokens: int) -> int:
        return tokens if self.keys is None else self.keys


@dataclass(frozen=True)
class Site:
    """One call of a block, where tokens can be reduced.

    Attributes:
        stage: index of the stage; token counts start anew with each.
        call: index of the call inside its stage.
        block: name of the block as the model has it.
        tokens_first: tokens at the start of the stage, prefix tokens included.
        n_prefix: class, distillation and register tokens, which are never merged.
        multiple: the tokens left must be a multiple of this.
        cost: MACs of the call.
        width: channels of a token.
    """

    stage: int
    call: int
    block: str
    tokens_first: int
    n_prefix: int
    multiple: int
    cost: Cost
    width: int = 0


@dataclass(frozen=True)
class ModelCost:
    """A model as the plan sees it: its sites, and what it costs outside of them.

    Attributes:
        name: what the user calls the model.
        sites: the calls of its blocks, in order.
        fixed: MACs that no token count changes (stem, convolutions between stages, classifier).
        pool: MACs per token that is left to pool.
        n_read: how many tokens at the front the head reads; None if it reads all.
        pool_products: the part of `pool` that is attention products.
        norm_fixed: elements that are normalised whatever the token counts.
        norm_left: elements that are normalised per token left at the end.
        head, norm_head: the part of `fixed` and `norm_fixed` that comes after the tokens.
    """

    name: str
    sites: tuple[Site, ...]
    fixed: int
    pool: int = 0
    n_read: int | None = None
    pool_products: int = 0
    norm_fixed: int = 0
    norm_left: int = 0
    head: int = 0
    norm_head: int = 0

    def without_head(self) -> ModelCost:
        """Return the cost of the same model if it ends with its tokens."""
        return dataclasses.replace(
            self,
            fixed=self.fixed - self.head,
            norm_fixed=self.norm_fixed - self.norm_head,
            pool=0,
            pool_products=0,
            n_read=None,
            head=0,
            norm_head=0,
        )

    def macs(self, tokens: Sequence[tuple[int, int]], left: int) -> int:
        """Return the MACs of an image; tokens are (in, out) of each site, `left` at the end."""
        blocks = [site.cost.macs(*each) for site, each in zip(self.sites, tokens, strict=True)]
        return self.fixed + sum(blocks) + self.pool * (left - self.sites[-1].n_prefix)

    def flops_slides(self, tokens: Sequence[tuple[int, int]], left: int) -> int:
        """Return the FLOPs of an image by the convention of `Plan.flops_slides`."""
        n_pooled = left - self.sites[-1].n_prefix
        blocks = [
            site.cost.flops_slides(*each) for site, each in zip(self.sites, tokens, strict=True)
        ]
        products = self.fixed + (self.pool - self.pool_products) * n_pooled
        return sum(blocks) + _flops_slides(products, self.norm_fixed + self.norm_left * left)


def _flops_slides(products: int, normalised: int) -> int:
    return 2 * (products + 4 * normalised)


@dataclass(frozen=True)
class Schedule:
    """How many tokens to remove at each site, as the user asked for it.

    Usage:
        >>> Schedule.parse("exp:0.25,0").text
        'exp:0.25,0'

    Attributes:
        kind: "none", "const", "linear", "exp", "list", "keep" or "diffrate".
        values: its numbers; integers except for "exp" and "keep", none for "diffrate".
        text: the schedule as it was written.
        places: the sites of a "keep" schedule; empty for all.
        budgets: of a "diffrate" schedule, the tokens left at each site: after pruning, and after
            merging.
    """

    kind: str
    values: tuple[float, ...]
    text: str
    places: tuple[int, ...] = ()
    budgets: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a schedule.

        A file is read at once, so that the schedule says all by itself.

        Raises: PlanError saying which number is missing, malformed or out of range, or what is
            wrong with the file.
        """
        kind, colon, rest = text.strip().partition(":")
        if kind not in (*_PARSERS, "keep", "diffrate"):
            raise PlanError(f"Unknown schedule {text!r}; a schedule is {_FORMS}.")
        if kind == "none":
            if colon:
                raise PlanError(f"{text!r}: 'none' takes no numbers; write it alone.")
            return cls("none", (), "none")
        if kind == "keep":
            return cls(kind, *_parse_keep(text, rest))
        if kind == "diffrate":
            lists, budgets = _parse_diffrate(text, rest)
            return cls(kind, (), f"diffrate:{lists}", budgets=budgets)
        fields = rest.split(",")
        return cls(kind, _PARSERS[kind](text, fields), f"{kind}:{','.join(fields)}")

    def shares(self, n_sites: int, counting: Counting) -> list[float | None]:
        """Return the share to keep at each site; None at those that remove by count, or nothing.

        Raises: PlanError if a place is no site, or if the shares do not fit the places.
        """
        if self.kind != "keep":
            return [None] * n_sites
        places = self.places or tuple(range(n_sites))
        if places[-1] >= n_sites:
            raise PlanError(
                f"{self.text} names block {places[-1]}, but the model has {n_sites} blocks, 0 to "
                f"{n_sites - 1}."
            )
        if len(self.values) not in (1, len(places)):
            raise PlanError(
                f"{self.text} has {len(self.values)} shares for {len(places)} blocks; give one "
                "for all, or one for each."
            )
        found: list[float | None] = [None] * n_sites
        for place, share in zip(places, counting.shares(self.values, len(places)), strict=True):
            found[place] = share
        return found

    def requests(self, sites: Sequence[Site]) -> list[int]:
        """Return the tokens requested at each site, before caps and alignment.

        A schedule of shares requests nothing by count; see `shares`.

        Raises: PlanError if a list is longer than the sites.
        """
        n = len(sites)
        if self.kind in ("none", "keep", "diffrate"):
            return [0] * n
        if self.kind == "const":
            return [int(self.values[0])] * n
        if self.kind == "linear":
            first = 2 * int(self.values[0])
            step = first / (n - 1) if n > 1 else 0.0
            return [int(first - step * i) for i in range(n)]
        if self.kind == "exp":
            r_init, alpha = self.values
            starts = [int((site.tokens_first - site.n_prefix) * r_init) for site in sites]
            return [
                int(start * alpha**site.call) for start, site in zip(starts, sites, strict=True)
            ]
        if len(self.values) > n:
            raise PlanError(
                f"{self.text} has {len(self.values)} numbers, but the model has {n} sites; "
                f"leave out the last {len(self.values) - n}."
            )
        return [int(value) for value in self.values] + [0] * self.padding(n)

    def kept(self, n_sites: int) -> Sequence[tuple[int, int] | None]:
        """Return the tokens to keep at each site, after pruning and after merging; None if free.

        Raises: PlanError if there are not as many as sites.
        """
        if self.kind != "diffrate":
            return [None] * n_sites
        if len(self.budgets) != n_sites:
            raise PlanError(
                f"{self.text} has counts for {len(self.budgets)} blocks, but the model has "
                f"{n_sites}; take the lists of this model."
            )
        return self.budgets

    def padding(self, n_sites: int) -> int:
        """Return how many sites a list leaves unnamed; they remove nothing."""
        return max(0, n_sites - len(self.values)) if self.kind == "list" else 0


def _count(text: str, field: str, position: str) -> int:
    if not re.fullmatch(r"[0-9]+", field.strip()):
        what = "is empty" if not field.strip() else f"is {field.strip()!r}"
        raise PlanError(
            f"{text!r}: {position} {what}; token counts are whole numbers from 0 up, like 8."
        )
    if len(field.strip().lstrip("0")) > 7 or int(field) > _COUNT_LIMIT:
        raise PlanError(
            f"{text!r}: {position} is above {_COUNT_LIMIT:,}, more tokens than a model has."
        )
    return int(field)


def _parse_one_count(text: str, fields: list[str]) -> tuple[float, ...]:
    if len(fields) != 1:
        raise PlanError(
            f"{text!r} has {len(fields)} numbers; this schedule takes one count per block. "
            f"For a count of its own for each block write list:{','.join(fields)}"
        )
    return (_count(text, fields[0], "the count"),)


def _parse_list(text: str, fields: list[str]) -> tuple[float, ...]:
    return tuple(_count(text, field, f"number {i + 1}") for i, field in enumerate(fields))


def _parse_exp(text: str, fields: list[str]) -> tuple[float, ...]:
    if len(fields) != 2:
        n = len(fields) if any(fields) else 0
        raise PlanError(
            f"{text!r} has {n} number{'s' if n != 1 else ''}; an exponential "
            "schedule needs two, the first share and its decay: exp:0.25,0 merges a quarter of "
            "the tokens once."
        )
    return tuple(
        _share(text, field, name) for field, name in zip(fields, ("R_INIT", "ALPHA"), strict=True)
    )


def _share(text: str, field: str, name: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", field.strip()):
        what = "is empty" if not field.strip() else f"is {field.strip()!r}"
        raise PlanError(f"{text!r}: {name} {what}; write a plain number from 0 to 1, like 0.25.")
    value = float(field)
    if value > 1:
        raise PlanError(
            f"{text!r}: {name} is {field.strip()}, but it is a share from 0 to 1, like 0.25."
        )
    return value


def _parse_keep(text: str, rest: str) -> tuple[tuple[float, ...], str, tuple[int, ...]]:
    """Return the shares, the text as it is written back, and the blocks of "keep:SHARES@BLOCKS"."""
    shares, at, blocks = rest.partition("@")
    fields, places = shares.split(","), blocks.split(",") if at else []
    values = tuple(_share(text, field, f"share {i + 1}") for i, field in enumerate(fields))
    if 0 in values:
        raise PlanError(f"{text!r} keeps a share of 0, which is no token at all; write above 0.")
    numbers = tuple(_count(text, field, f"block {i + 1}") for i, field in enumerate(places))
    if list(numbers) != sorted(set(numbers)):
        raise PlanError(
            f"{text!r} names its blocks as {','.join(places)}; name each once, in their order, "
            "counted from 0, like keep:0.7@3,6,9."
        )
    return values, f"keep:{','.join(fields)}{at}{','.join(places)}", numbers


_KEPT = ("prune_kept_num", "merge_kept_num")  # as DiffRate's own files call them


def _parse_diffrate(text: str, rest: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return both lists as they are written back, and the pairs of each block."""
    is_plain = re.fullmatch(r"[0-9, ]+/[0-9, ]+", rest)
    lists = [part.split(",") for part in rest.split("/")] if is_plain else _kept_in(text, rest)
    pruned, merged = (
        [_count(text, field, f"number {i + 1} of {name}") for i, field in enumerate(fields)]
        for name, fields in zip(_KEPT, lists, strict=True)
    )
    if len(pruned) != len(merged):
        raise PlanError(
            f"{text!r} has {len(pruned)} counts after pruning and {len(merged)} after merging; "
            "each block needs one of both."
        )
    budgets = tuple(zip(pruned, merged, strict=True))
    return f"{','.join(map(str, pruned))}/{','.join(map(str, merged))}", budgets


def _kept_in(text: str, rest: str) -> list[list[str]]:
    """Read both lists from a file of DiffRate's; they are lists, or strings that look like some."""
    name, _, entry = rest.partition("@")
    try:
        content = json.loads(Path(name).read_text())
    except (OSError, ValueError, RecursionError) as err:
        why = getattr(err, "strerror", None) or "it holds no JSON"
        raise PlanError(
            f"{text!r}: {name or 'no file'} cannot be read ({why}). Give DiffRate's JSON file, "
            f"with {' and '.join(_KEPT)}."
        ) from err
    for key in entry.split("/") if entry else ():
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict) or any(name not in content for name in _KEPT):
        found = ", ".join(content) if isinstance(content, dict) else "nothing of that name"
        raise PlanError(
            f"{text!r}: {' and '.join(_KEPT)} are not there; there is {found}. If the file has "
            "them for several models, name one: diffrate:FILE.json@MODEL/GFLOPS"
        )
    values = [content[name] for name in _KEPT]
    return [
        [str(count) for count in value]
        if isinstance(value, list)
        else str(value).strip("[] ").split(",")
        for value in values
    ]


_PARSERS: dict[str, Callable[[str, list[str]], tuple[float, ...]]] = {
    "none": lambda text, fields: (),
    "const": _parse_one_count,
    "linear": _parse_one_count,
    "exp": _parse_exp,
    "list": _parse_list,
}


@dataclass(frozen=True)
class Step:
    """What happens at one site. All counts include the prefix tokens.

    Attributes:
        block, stage, call: the site.
        tokens_in: tokens that the block is given.
        requested: tokens that the schedule asks to remove.
        removed: tokens that are removed, after the method's limit and the stage's alignment.
        tokens_out: tokens that the MLP sees.
        macs: multiply-accumulates of the block call.
        slices: how many runs of tokens the attention stays inside of.
        multiple: the tokens that are left are a multiple of this.
        restored: tokens that there are again after this call, where a stage ends and the next one
            needs its whole grid, or where those that waited come back; None elsewhere.
        place: where tokens are removed: "between" attention and MLP, or "before" the block, whose
            attention then sees `tokens_out`.
        pruned: how many of the removed are dropped rather than merged, where the schedule says so.
        n_prefix: how many of the tokens, at the front, are never merged.
    """

    block: str
    stage: int
    call: int
    tokens_in: int
    requested: int
    removed: int
    tokens_out: int
    macs: int
    slices: int = 1
    multiple: int = 1
    restored: int | None = None
    place: str = BETWEEN
    pruned: int = 0
    n_prefix: int = 0

    @property
    def attended(self) -> int:
        """Tokens that the attention sees."""
        return self.tokens_out if self.place == BEFORE else self.tokens_in

    @property
    def left(self) -> int:
        """Tokens after the call."""
        return self.restored or self.tokens_out


@dataclass(frozen=True)
class Plan:
    """The token count at every site of a model, and what it costs.

    Usage:
        plan = Plan.make(model_cost, Schedule.parse("const:8"), "tome", TWO_SET)
        plan.macs / plan.macs_unreduced

    Attributes:
        model: name of the model.
        method: name of the reduction method.
        schedule: the schedule as text.
        n_prefix: tokens that are never merged, in the last stage; each step has those of its own.
        steps: one per site, in order.
        macs: multiply-accumulates per image: convolutions, linear layers and attention.
        macs_unreduced: the same for the original model.
        macs_spared: how many of `macs` the file does not compute, because the head reads the class
            token alone and so the last block computes no other. Exact; not the method's doing.
        flops_slides: floating-point operations per image as the slides on SReT with merging, and
            the profiler thop, count them: 2 × (products of convolutions and linear layers +
            4 × elements that batch and layer norms take in); no attention products.
        flops_slides_unreduced: the same for the original model.
        notes: what the reader should know: capped, aligned or padded requests.
    """

    model: str
    method: str
    schedule: str
    n_prefix: int
    steps: tuple[Step, ...]
    macs: int
    macs_unreduced: int
    macs_spared: int = 0
    flops_slides: int = 0
    flops_slides_unreduced: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def make(
        cls, model: ModelCost, schedule: Schedule, method: str, counting: Counting = TWO_SET
    ) -> Plan:
        """Turn a schedule into the token counts of a model with at least one site.

        Raises: PlanError if the schedule does not fit the model's sites.
        """
        steps: list[Step] = []
        n = len(model.sites)
        requests, shares = schedule.requests(model.sites), schedule.shares(n, counting)
        budgets = schedule.kept(n)
        acts = [any(asked) for asked in zip(shares, budgets, requests, strict=True)]
        own = 0  # MACs of the method itself
        for index, site in enumerate(model.sites):
            tokens = steps[-1].left if steps and site.call else site.tokens_first
            share, request, budget = shares[index], requests[index], budgets[index]
            if share is not None:
                request = max(0, tokens - counting.keep(share, tokens, site))
            elif budget is not None:
                request = max(0, tokens - min(budget))
            removed = _fit(request, tokens, counting.limit(tokens, site.n_prefix), site.multiple)
            out = tokens - removed
            macs = counting.macs(site, tokens) if removed else 0
            own += macs
            stage_ends = any(after.stage != site.stage for after in model.sites[index + 1 :][:1])
            come_back = counting.waits and out < site.tokens_first and all(acts[index + 1 :][:1])
            met = out if counting.place == BEFORE else tokens
            steps.append(
                Step(
                    block=site.block,
                    stage=site.stage,
                    call=site.call,
                    tokens_in=tokens,
                    requested=request,
                    removed=removed,
                    tokens_out=out,
                    macs=site.cost.macs(met, out) + macs,
                    slices=site.cost.slices,
                    multiple=site.multiple,
                    restored=site.tokens_first if stage_ends or come_back else None,
                    place=counting.place,
                    pruned=0 if budget is None else min(removed, max(0, tokens - budget[0])),
                    n_prefix=site.n_prefix,
                )
            )
        last = model.sites[-1]
        reduced = [(step.attended, step.tokens_out) for step in steps]
        unreduced = [(site.tokens_first, site.tokens_first) for site in model.sites]
        return cls(
            model=model.name,
            method=method,
            schedule=schedule.text,
            n_prefix=last.n_prefix,
            steps=tuple(steps),
            macs=model.macs(reduced, steps[-1].left) + own,
            macs_unreduced=model.macs(unreduced, last.tokens_first),
            macs_spared=0 if model.n_read is None else last.cost.spared(*reduced[-1], model.n_read),
            flops_slides=model.flops_slides(reduced, steps[-1].left) + 2 * own,
            flops_slides_unreduced=model.flops_slides(unreduced, last.tokens_first),
            notes=_notes(steps, schedule.padding(n), counting.note),
        )

    @property
    def removed_total(self) -> int:
        """Tokens removed over all sites."""
        return sum(step.removed for step in self.steps)

    @property
    def n_reductions(self) -> int:
        """Reductions in the file: none in the last block if only the class token is read."""
        after = self.steps[-1].place == BETWEEN and self.macs_spared > 0
        return sum(step.removed > 0 for step in (self.steps[:-1] if after else self.steps))

    @property
    def staged(self) -> bool:
        """Whether there is more than one stage, so that tokens come back in between."""
        return self.steps[-1].stage > 0

    @property
    def predicted_speedup(self) -> float:
        """Speed-up if time were proportional to MACs."""
        return self.macs_unreduced / self.macs

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data; the sites hold integers and the block's name."""
        data = dataclasses.asdict(self)
        data["sites"] = data.pop("steps")
        return data | {
            "removed_total": self.removed_total,
            "predicted_speedup": round(self.predicted_speedup, 4),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from `to_dict`."""
        names = [field.name for field in dataclasses.fields(cls) if field.name in data]
        fields = {name: data[name] for name in names}
        n_prefix = {"n_prefix": data["n_prefix"]}  # of steps that do not say their own
        fields["steps"] = tuple(Step(**(n_prefix | step)) for step in data["sites"])
        fields["notes"] = tuple(data["notes"])
        return cls(**fields)


def _fit(request: int, tokens: int, limit: int, multiple: int) -> int:
    """Return what can be removed of a request: aligned upwards, then within the limit."""
    if request == 0:
        return 0
    aligned = request + (tokens - request) % multiple
    if aligned <= limit:
        return aligned
    return max(0, limit - (limit - tokens) % multiple)


def _notes(steps: Sequence[Step], padding: int, note: str) -> tuple[str, ...]:
    notes = [note] if note else []
    capped = [step for step in steps if step.removed < step.requested]
    if capped:
        notes.append(f"capped at the most that can be removed there ({_where(capped)})")
    aligned = [step for step in steps if step.removed > step.requested]
    if aligned:
        notes.append(f"rounded up, so that the rest divides into slices ({_where(aligned)})")
    if padding:
        notes.append(f"the list names {len(steps) - padding} of {len(steps)} sites; 0 at the rest")
    return tuple(notes)


def _where(steps: Sequence[Step]) -> str:
    return ", ".join(f"{s.block}: {s.requested} → {s.removed}" for s in steps)
