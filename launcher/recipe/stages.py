"""Training stages: what `[[stage]]` tables make of a recipe, one recipe after the other.

    [train]  [model] ...         the recipe's own tables
       |  + [[stage]] 0          fields that the stage sets; those that it leaves out go on
    recipe of stage 0
       |  + [[stage]] 1
    recipe of stage 1 ...

A recipe without such tables is one stage. What a stage does not set goes on where the stage before
left it: also the order of the data, and the schedule of the learning rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe, StageConfig, changed, given
from colonnade.launcher.recipe.unused import UsedIf, explicit_fields, unused_setting

ORDERED_BY = ("sources", "held_out", "packing")  # of [data]: with another value rows are others
SCHEDULE = {"lr", "schedule", "warmup", "decay", "min_lr"}  # a stage that sets one begins anew
WITHOUT_STAGES = {"steps", "ramp_batch", "ramp_steps"}  # of [train]: stages have their own
LONGEST = 2**40  # steps, while the length of a stage is not known


@dataclass(frozen=True)
class TrainingStage:
    """One stage of a run; steps and samples count from the run's first.

    Attributes:
        index: of its `[[stage]]` table.
        recipe: that is in force, without stages; its `train.steps` is the run's step at which the
            stage ends.
        first: the steps before it.
        samples: the index of its first sample in the order of its data.
        order: of the data; stages whose data and rows are the same have one order.
        schedule_first: the step at which its schedule of the learning rate begins.
        schedule_steps: the steps of that schedule, over all stages that do not set another.
    """

    index: int
    recipe: Recipe
    first: int
    samples: int
    order: int
    schedule_first: int
    schedule_steps: int

    @property
    def stop(self) -> int:
        """The step at which it ends."""
        return self.recipe.train.steps

    @property
    def steps(self) -> int:
        """Its number of steps."""
        return self.stop - self.first

    @property
    def checked(self) -> Recipe:
        """The recipe to which the rules of single recipes apply: as long as its schedule."""
        train = {"steps": self.schedule_steps, "timeline": None}
        return self.recipe.model_copy(update={"train": changed(self.recipe.train, train)})


def training_stages(recipe: Recipe) -> list[TrainingStage]:
    """Returns the stages of a run, in order: one, if the recipe has no `[[stage]]` tables."""
    if not recipe.stage:
        steps = recipe.train.steps
        return [TrainingStage(0, recipe, 0, 0, 0, 0, steps)]
    recipes = [without_inherited_unused(recipe, n, r) for n, r in enumerate(merged(recipe))]
    lengths = [steps_of(one, r) for one, r in zip(recipe.stage, recipes, strict=True)]
    new_schedule = [bool(SCHEDULE & s.tables()["optimizer"].model_fields_set) for s in recipe.stage]
    begins = [n for n, new in enumerate(new_schedule) if new or n == 0]
    stages: list[TrainingStage] = []
    for n, r in enumerate(recipes):
        first = sum(lengths[:n])
        begin = max(b for b in begins if b <= n)
        end = min((b for b in begins if b > n), default=len(recipes))
        order, samples = order_after(stages[-1], r) if stages else (0, 0)
        train = changed(r.train, {"steps": first + lengths[n]})
        stages.append(
            TrainingStage(
                n, r.model_copy(update={"train": train}), first, samples, order,
                sum(lengths[:begin]), sum(lengths[begin:end]),
            )
        )  # fmt: skip
    return stages


def order_after(before: TrainingStage, recipe: Recipe) -> tuple[int, int]:
    """Returns order and first sample of a stage's data: those of the stage before go on where rows
    are the same."""

    def rows(r: Recipe) -> list[object]:
        return [r.train.seq_len, *(getattr(r.data, name) for name in ORDERED_BY)]

    if rows(before.recipe) != rows(recipe):
        return before.order + 1, 0
    return before.order, before.samples + before.steps * before.recipe.train.global_batch


def steps_of(stage: StageConfig, recipe: Recipe) -> int:
    """Returns the steps of a stage with this recipe in force."""
    if stage.tokens is None:
        return stage.steps or LONGEST  # a rule wants one of both
    return -(-stage.tokens // (recipe.train.global_batch * recipe.train.seq_len))


def stage_at(stages: Sequence[TrainingStage], step: int) -> TrainingStage:
    """Returns the stage that has trained a run which is at `step`; at 0 the first."""
    return next((stage for stage in stages if step <= stage.stop), stages[-1])


def stages_from(stages: Sequence[TrainingStage], step: int) -> Sequence[TrainingStage]:
    """Returns the stages that a run which is at `step` still trains, at its end the last."""
    return [stage for stage in stages if stage.stop > step] or stages[-1:]


def recipe_at(recipe: Recipe, step: int) -> Recipe:
    """Returns the recipe in force of a run that is at `step`."""
    return stage_at(training_stages(recipe), step).recipe


def recipe_of_stage(recipe: Recipe, index: int | None) -> Recipe:
    """Returns the recipe in force in a training stage; without stages that is the recipe.

    Raises:
        UserError: the recipe has several stages and none is named, or has none of this index.
    """
    stages = training_stages(recipe)
    if index is None and len(stages) > 1:
        raise UserError(
            f"the recipe has the stages 0 to {len(stages) - 1}, which may differ in layout and "
            "rows: name one by --stage"
        )
    if index is not None and not recipe.stage:
        raise UserError(f"--stage {index}: the recipe has no [[stage]] tables; leave it out")
    if index is not None and index >= len(stages):
        raise UserError(f"--stage {index}: the recipe has the stages 0 to {len(stages) - 1}")
    return stages[index or 0].recipe


# Merging


def merged(recipe: Recipe) -> list[Recipe]:
    """Returns the recipe of every stage: that of the stage before with the fields that it sets."""
    train = changed(recipe.train, {"steps": LONGEST}, remove=WITHOUT_STAGES - {"steps"})
    before = recipe.model_copy(update={"stage": (), "train": train})
    recipes = []
    for stage in recipe.stage:
        tables = {
            name: changed(getattr(before, name), given(table))
            for name, table in stage.tables().items()
        }
        before = before.model_copy(update=tables)
        recipes.append(before)
    return recipes


def without_inherited_unused(whole: Recipe, index: int, recipe: Recipe) -> Recipe:
    """Returns a stage's recipe without the fields that have no effect in it, unless it sets them:
    the scaling of positions that a later stage ends, for instance."""
    own = set_by(whole.stage[index])
    # Leaving out one field may make another one unused, so repeat until nothing changes.
    while unused := [
        field
        for field, _ in explicit_fields(recipe)
        if setter(field, own) is None and unused_setting(recipe, field)
    ]:
        by_table: dict[str, set[str]] = {}
        for field in unused:
            table, _, name = field.partition(".")
            by_table.setdefault(table, set()).add(name)
        for table, names in by_table.items():
            kept = changed(getattr(recipe, table), {}, remove=names)
            recipe = recipe.model_copy(update={table: kept})
    return recipe


# Fields


def set_by(stage: StageConfig) -> set[str]:
    """Returns the dotted fields of the tables that a stage sets, as `train.seq_len`."""
    return {f"{t}.{n}" for t, table in stage.tables().items() for n in table.model_fields_set}


def setter(field: str, names: set[str]) -> str | None:
    """Returns which of these names is a field or holds it: `data.sources` holds
    `data.sources.0.path`."""
    return next((name for name in names if f"{field}.".startswith(f"{name}.")), None)


def field_in_force(recipe: Recipe, index: int, field: str) -> str:
    """Returns the dotted field of a recipe that sets a field of a stage's recipe: that of the last
    stage up to it that does, or else that of the recipe itself."""
    for n in range(index, -1, -1):
        if setter(field, set_by(recipe.stage[n])):
            return f"stage.{n}.{field}"
    return field


def field_to_change(recipe: Recipe, index: int, field: str) -> str:
    """Returns the dotted field by which a stage's recipe gets another value of a field: of the
    stage, unless it is the first and goes on with the recipe's own, or no stage sets that field."""
    table, _, name = field.partition(".")
    tables = recipe.stage[index].tables()
    settable = table in tables and name.partition(".")[0] in type(tables[table]).model_fields
    if settable and (index or setter(field, set_by(recipe.stage[index]))):
        return f"stage.{index}.{field}"
    return field


def unused_in_run(recipe: Recipe, field: str) -> UsedIf | None:
    """As `unused_setting`, for a field of a recipe with stages: one of a stage has to be used in
    that stage, and one of the recipe itself in some stage that goes on with it."""
    stage, _, rest = field.partition(".")
    index, _, inner = rest.partition(".")
    if recipe.stage and stage == "stage":
        return unused_setting(merged(recipe)[int(index)], inner) if "." in inner else None
    unused = unused_setting(recipe, field)
    of_single = stage == "train" and rest in WITHOUT_STAGES
    if unused is not None and recipe.stage and not of_single:
        for n, in_force in enumerate(merged(recipe)):
            own = field_in_force(recipe, n, field) == field and has_field(in_force, field)
            if own and unused_setting(in_force, field) is None:
                return None
    return unused


def has_field(recipe: Recipe, field: str) -> bool:
    """Whether a recipe sets a field explicitly."""
    return any(name == field for name, _ in explicit_fields(recipe))
