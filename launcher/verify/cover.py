"""The covering set of `verify`: few cases that have every pair of choices at least once.

A choice is an axis that is on or off, or a value of an option, such as `schedule=zbv`. A greedy
search takes case after case, each time one with as many new pairs as any other; its ties are broken
by a seed, so that the set follows from the recipe, the number of ranks and the seed.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import divisors
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import unused_setting
from colonnade.launcher.verify.cases import OPTIONS as OPTIONS_OF_CASES
from colonnade.launcher.verify.cases import Case
from colonnade.launcher.verify.layouts import Layout, with_layout
from colonnade.parallel.config import ParallelConfig

DENSE_AXES = ("dp_replicate", "dp_shard", "cp", "tp", "pp")  # their degrees multiply to the ranks
AXES = (*DENSE_AXES, "ep")
# Every other choice: by name, its values.
OPTIONS: dict[str, tuple[object, ...]] = {
    "etp": ("tp", 1),
    "sequence": (True, False),
    "schedule": ("gpipe", "1f1b", "interleaved", "bfs", "zb1p", "zbv", "dualpipev"),
    "context": ("ring", "ulysses", "ring+ulysses", "allgather"),
    "recurrence": ("states", "heads"),
    "zigzag": (True, False),
    "residual": ("standard", "ladder"),
    "recompute": ("none", "selective", "block"),
    "offload": ("none", "host", "interleaved"),
}
NEEDS = {"etp": "tp", "sequence": "tp", "schedule": "pp", "context": "cp", "recurrence": "cp",
         "zigzag": "cp"}  # by option: the axis with which it is a choice  # fmt: skip

Choices = dict[str, object]  # by name: "on" or "off" for an axis, the value of an option
Choice = tuple[str, object]
Check = Callable[[Case], list[Fault]]


class Uncovered(NamedTuple):
    """A pair of choices that no valid case has, and why."""

    pair: str
    why: str


@dataclass(frozen=True)
class Cover:
    """A covering set.

    Attributes:
        cases: in the order in which they were found: earlier ones have more pairs.
        pairs: how many pairs of choices they have.
        impossible: the pairs that no valid case has.
    """

    cases: tuple[Case, ...]
    pairs: int
    impossible: tuple[Uncovered, ...]


def cover(
    recipe: Recipe, ranks: int, check: Check, fixed: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Cover:  # fmt: skip
    """Finds a covering set of valid cases of `ranks`.

    It also has every pair of axes, both on, with either residual wiring.

    Args:
        recipe: whose sub-blocks decide which options have an effect.
        ranks: their number.
        check: returns the faults of a case; one with faults is not valid.
        fixed: options that have one value in all cases.
        seed: breaks ties.
    """
    candidates = list(all_cases(recipe, ranks, fixed or {}))
    Random(seed).shuffle(candidates)
    numbers: dict[tuple[Choice, ...], int] = {}  # of the bit of each pair
    bits = [bits_of(choices_of(case, ranks), numbers) for case in candidates]
    stages = [stages_of(case) for case in candidates]
    chosen: list[Case] = []
    faults: dict[int, Fault] = {}
    checked: dict[str, list[Fault]] = {}

    def is_valid(index: int) -> bool:
        """Whether a candidate has no faults; recomputation and offload change none."""
        one = Case(candidates[index].layout, candidates[index].residual)
        if (name := str(one)) not in checked:
            checked[name] = check(one)
        if checked[name]:
            faults[bits[index]] = checked[name][0]
            bits[index] = 0
        return not checked[name]

    remaining = (1 << len(numbers)) - 1
    while remaining:
        gains = [(b & remaining).bit_count() for b in bits]
        useful = [i for i, gain in enumerate(gains) if gain]
        useful.sort(key=lambda i: (-gains[i], stages[i]))
        best = next(filter(is_valid, useful), None)
        if best is None:
            break
        chosen.append(candidates[best])
        remaining &= ~bits[best]
    covered = {pair for pair, bit in numbers.items() if not remaining >> bit & 1}
    impossible = [pair for pair in all_pairs() if pair not in covered]

    def why(pair: tuple[Choice, ...]) -> str:
        having = 1 << numbers[pair] if pair in numbers else 0
        found = (str(fault) for b, fault in faults.items() if b & having)
        return next(found, None) or structural_reason(recipe, ranks, pair)

    missing = tuple(Uncovered(" with ".join(f"{n}={v}" for n, v in p), why(p)) for p in impossible)
    return Cover(tuple(chosen), len(list(all_pairs())) - len(missing), missing)


def structural_reason(recipe: Recipe, ranks: int, pair: tuple[Choice, ...]) -> str:
    """Returns why no layout has a pair of choices: an option without effect, or too few ranks."""
    off = {name for name, value in pair if value == "off"}
    layout: Layout = {axis: 2 for axis in DENSE_AXES if axis not in off}
    for name, value in pair:
        if value == "off" or (name not in NEEDS and name != "ep"):
            continue
        if unused := unused_setting(with_layout(recipe, layout), f"parallel.{name}"):
            return f"parallel.{name} has no effect {unused.otherwise}"
    return f"no layout of {ranks} ranks has both"


def all_pairs() -> Iterator[tuple[Choice, Choice]]:
    """Yields every pair of choices of different names."""
    values = {**{axis: ("on", "off") for axis in AXES}, **OPTIONS}
    for (a, of_a), (b, of_b) in itertools.combinations(values.items(), 2):
        yield from (((a, x), (b, y)) for x in of_a for y in of_b)


def bits_of(choices: Choices, numbers: dict[tuple[Choice, ...], int]) -> int:
    """Returns what a case covers as bits, and numbers those that are new.

    It covers pairs of its choices, and pairs of axes that are both on with its residual wiring.
    """
    found: list[tuple[Choice, ...]] = list(itertools.combinations(choices.items(), 2))
    wiring = ("residual", choices["residual"])
    on = [(axis, "on") for axis in AXES if choices[axis] == "on"]
    found += [(a, b, wiring) for a, b in itertools.combinations(on, 2)]
    total = 0
    for one in found:
        total |= 1 << numbers.setdefault(one, len(numbers))
    return total


def choices_of(case: Case, ranks: int) -> Choices:
    """Returns the choices of a case, in the order of `AXES` and `OPTIONS`; options without effect
    are none."""
    degrees = degrees_of(case.layout, ranks)
    values: Choices = {axis: "on" if degree > 1 else "off" for axis, degree in degrees.items()}
    given = {**case.layout, **{name: getattr(case, name) for name in OPTIONS_OF_CASES}}
    if given.get("etp", 1) != 1:
        given["etp"] = "tp"
    return values | {name: given[name] for name in OPTIONS if name in given}


def degrees_of(layout: Layout, ranks: int) -> dict[str, int]:
    """Returns the degree of every axis of a layout."""
    degrees = {axis: int(str(layout.get(axis, 1))) for axis in AXES}
    if "dp_shard" not in layout:  # all remaining ranks
        degrees["dp_shard"] = ranks // math.prod(degrees[axis] for axis in DENSE_AXES)
    return degrees


def stages_of(case: Case) -> int:
    """Returns how many stages a case has: with fewer, a model of fewer sub-blocks can have it."""
    fields = {n: v for n, v in case.layout.items() if n in ("pp", "schedule", "stages_per_rank")}
    return ParallelConfig.model_validate(fields).stage_count


# All cases


def all_cases(recipe: Recipe, ranks: int, fixed: Mapping[str, object]) -> Iterator[Case]:
    """Yields the cases among which the search chooses; some of them may not be valid."""
    wirings = dict.fromkeys((*OPTIONS["residual"], recipe.model.residual))
    values = {**OPTIONS, "residual": tuple(wirings), **{n: (v,) for n, v in fixed.items()}}
    if recipe.optimizer.name != "adamw":
        values["offload"] = ("none",)
    for layout in all_layouts(recipe, ranks, values):
        for chosen in itertools.product(*(values[name] for name in OPTIONS_OF_CASES)):
            yield Case(layout, *map(str, chosen))


def all_layouts(
    recipe: Recipe, ranks: int, values: Mapping[str, tuple[object, ...]] = OPTIONS
) -> Iterator[Layout]:
    """Yields layouts of `ranks`, with each of these values of the options that have an effect."""
    for degrees in factorisations(ranks):
        yield from layouts_of(recipe, degrees, values)


def layouts_of(
    recipe: Recipe, degrees: Mapping[str, int], values: Mapping[str, tuple[object, ...]] = OPTIONS
) -> Iterator[Layout]:
    """Yields the layouts of these degrees of the dense axes, as `all_layouts` does."""
    on: Layout = {axis: degree for axis, degree in degrees.items() if degree > 1}
    used = used_options(recipe) & values.keys()
    effective = [name for name, axis in NEEDS.items() if name in used and axis in on]
    has_experts = unused_setting(recipe, "parallel.ep") is None
    for chosen in itertools.product(*(values[name] for name in effective)):
        options = dict(zip(effective, chosen, strict=True))
        if options.get("etp") == "tp":
            options["etp"] = degrees["tp"]
        for ep in expert_degrees(recipe, degrees, options) if has_experts else [1]:
            yield on | ({"ep": ep} if ep > 1 else {}) | options


def factorisations(ranks: int) -> Iterator[dict[str, int]]:
    """Yields degrees of the dense axes whose product is `ranks`: for every set of axes that may be
    on, each of them in turn has all ranks that the others, at the smallest degrees, leave."""
    factors = prime_factors(ranks)
    for count in range(min(len(factors), len(DENSE_AXES)) + 1):
        if count == 0 and ranks > 1:
            continue
        small = factors[: max(0, count - 1)]
        degrees = [*small, ranks // math.prod(small)] if count else []
        for axes in itertools.combinations(DENSE_AXES, count):
            for order in sorted(set(itertools.permutations(degrees))):
                yield dict.fromkeys(DENSE_AXES, 1) | dict(zip(axes, order, strict=True))


def prime_factors(n: int) -> list[int]:
    """Returns the prime factors of `n`, in ascending order."""
    factors: list[int] = []
    while n > 1:
        factors.append(divisors(n)[1])
        n //= factors[-1]
    return factors


def used_options(recipe: Recipe) -> set[str]:
    """Returns the options of a layout that have an effect on this model where their axis is on."""
    on = with_layout(recipe, {"cp": 2, "tp": 2, "pp": 2, "dp_shard": 2})
    return {name for name in NEEDS if unused_setting(on, f"parallel.{name}") is None}


def expert_degrees(
    recipe: Recipe, degrees: Mapping[str, int], options: Mapping[str, object]
) -> list[int]:
    """Returns 1, and the smallest and the largest number of ranks that can divide the experts."""
    folded = degrees["dp_shard"] * degrees["cp"] * degrees["tp"]
    folded //= int(str(options.get("etp", degrees["tp"])))
    possible = divisors(math.gcd(recipe.model.experts, folded))[1:]
    return sorted({1, *possible[:1], *possible[-1:]})
