"""What `verify` is to do: recipes with their cases, as jobs that ranks read."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.errors import Fault, RecipeError, UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.stages import recipe_of_stage
from colonnade.launcher.recipe.tables import GuardConfig, Recipe, changed
from colonnade.launcher.recipe.unused import explicit_fields
from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.train.run import fields_of_init
from colonnade.launcher.verify.cases import OPTIONS, Case, with_case
from colonnade.launcher.verify.cover import Cover, Uncovered, cover
from colonnade.launcher.verify.layouts import (
    DEGREES,
    FIELDS,
    Layout,
    accumulated,
    data_ranks,
    parse_layout,
)
from colonnade.launcher.verify.shrink import STEPS
from colonnade.parallel.config import ParallelConfig

# The recipes of `verify --all`, by family.
FAMILIES = {
    "dense": "tiny-dense",
    "mixture": "tiny-mixture",
    "hybrid": "tiny-hybrid",
    "hybrid mixture": "tiny-hybrid-mixture",
}
STEPS_OF_ALL = 2


@dataclass(frozen=True)
class Job:
    """What the ranks verify of one recipe.

    Attributes:
        recipe: in full size.
        cases: those to compare with one process.
        steps: of each.
        precisions: of each, on a device that has them all.
        covering: the covering set of which the cases are all or a sample; None: they were named.
    """

    recipe: Recipe
    cases: tuple[Case, ...]
    steps: int = STEPS
    precisions: tuple[str, ...] = ("fp64", "fp32")
    covering: Cover | None = None

    def write(self) -> str:
        """The job as JSON; fields that the recipe does not give are left out."""
        values = {
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
            "cases": list(map(str, self.cases)),
            "steps": self.steps,
            "precisions": self.precisions,
        }
        if self.covering is not None:
            c = self.covering
            values["covering"] = [list(map(str, c.cases)), c.pairs, c.impossible]
        return json.dumps(values)

    @classmethod
    def read(cls, text: str) -> "Job":
        """The job whose JSON `write` returned."""
        values = json.loads(text)
        covering = None
        if "covering" in values:
            cases, pairs, impossible = values["covering"]
            uncovered = tuple(Uncovered(*one) for one in impossible)
            covering = Cover(tuple(map(Case.parse, cases)), pairs, uncovered)
        return cls(
            Recipe.model_validate(values["recipe"]),
            tuple(map(Case.parse, values["cases"])),
            values["steps"],
            tuple(values["precisions"]),
            covering,
        )


def plan_job(
    recipe: Recipe | str | Path,
    overrides: Sequence[str],
    size: int,
    layouts: Sequence[str],
    sample: int | None = None,
    seed: int = 0,
    stage: int | None = None,
) -> Job:
    """Loads the recipe, and chooses the cases of `size` ranks to verify.

    Args:
        recipe: a recipe, the path of one, or the name of one that is shipped.
        overrides: of the recipe. In the covering set, an option that is among them has this value.
        size: the number of ranks.
        layouts: names of cases; none: the covering set.
        sample: how many cases of the covering set; None: all.
        seed: chooses them.
        stage: of a recipe with training stages, the one that is compared.

    Raises:
        UserError: there is nothing to compare, or a mistake in the recipe or a layout.
    """
    chosen = [Case.parse(text) for text in layouts]
    if size == 1 and not chosen:
        raise UserError(
            "verify compares several ranks with one: give --nproc, 2 or more, or a --layout"
        )
    if sample is not None and chosen:
        raise UserError("--sample draws from the covering set: leave out it, or --layout")
    overrides, shared = split_overrides(overrides)
    if not isinstance(recipe, Recipe):
        environment = RankEnvironment.from_environment()
        first = environment is None or environment.rank == 0
        report = partial(print, file=sys.stderr) if first else None
        recipe = load_recipe(recipe, overrides, None, report, fields_of_init)
    elif overrides:
        raise UserError("overrides go with a recipe's name or path; change a Recipe by model_copy")
    recipe = recipe_of_stage(recipe, stage)
    parallel = ParallelConfig.model_validate(dict(explicit_fields(recipe.parallel)) | shared)
    recipe = recipe.model_copy(update={"parallel": parallel})
    if chosen:
        faults = [fault for case in chosen for fault in case_faults(recipe, size, case)]
        if faults:
            raise RecipeError(list({str(f): f for f in faults}.values()))
        return Job(recipe, tuple({str(case): case for case in chosen}.values()))
    fixed = shared | fixed_options(recipe, overrides)
    found = cover(recipe, size, partial(case_faults, recipe, size), fixed)
    assert found.cases, "data parallelism alone fits every recipe"
    return Job(recipe, drawn(found.cases, sample, seed), covering=found)


def plan_all(size: int, sample: int | None = None, seed: int = 0) -> list[Job]:
    """Plans the covering sets of the recipes of all families, in fp64 alone, with two steps.

    Args:
        size: the number of ranks.
        sample: how many cases of each set; None: all.
        seed: chooses them.
    """
    jobs = [plan_job(name, [], size, [], sample, seed) for name in FAMILIES.values()]
    return [replace(job, steps=STEPS_OF_ALL, precisions=("fp64",)) for job in jobs]


def drawn(cases: tuple[Case, ...], sample: int | None, seed: int) -> tuple[Case, ...]:
    """Returns so many of the cases at random, in their order; all where `sample` is None."""
    if sample is None or sample >= len(cases):
        return cases
    return tuple(cases[i] for i in sorted(Random(seed).sample(range(len(cases)), sample)))


def case_faults(recipe: Recipe, size: int, case: Case) -> list[Fault]:
    """Returns the faults of a recipe under a case."""
    return validate(fitted(recipe, case, size), size)


def fitted(recipe: Recipe, case: Case, size: int) -> Recipe:
    """The recipe under a case, with a batch that fits it: that of the shrunk recipe will. Nothing
    guards the few steps of a comparison."""
    placed = with_case(recipe, case)
    rows, ranks = recipe.model.balance_samples, max(1, data_ranks(placed, size))
    count = accumulated(placed)
    batch: dict[str, object] = {"micro_batch": rows, "global_batch": rows * ranks * count}
    train = changed(placed.train, batch, remove=("ramp_batch", "ramp_steps", "timeline"))
    return placed.model_copy(update={"train": train, "guard": GuardConfig()})


def fixed_options(recipe: Recipe, overrides: Sequence[str]) -> dict[str, object]:
    """Returns the options outside `[parallel]` that overrides set, with their values."""
    given = {text.partition("=")[0].strip() for text in overrides}
    return {
        name: getattr(getattr(recipe, table), name)
        for name, table in OPTIONS.items()
        if f"{table}.{name}" in given
    }


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], Layout]:
    """Splits overrides into those of other tables, and fields of `[parallel]` for all layouts.

    Raises:
        UserError: a degree of parallelism is among them.
    """
    others: list[str] = []
    shared: Layout = {}
    for text in overrides:
        field, _, value = (word.strip() for word in text.partition("="))
        table, _, name = field.partition(".")
        if table != "parallel" or name not in FIELDS:
            others.append(text)
        elif name in DEGREES:
            raise UserError(f"{text}: name layouts as such: --layout {name}={value}")
        else:
            shared |= parse_layout(f"{name}={value}")
    return others, shared
