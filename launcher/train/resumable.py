"""Which fields of a recipe may change when a run goes on.

All fields of training stages that have not begun; of others those that change neither the model,
nor the kind of optimizer, nor the order of the data.
"""

from typing import Any

from colonnade.launcher.errors import Fault, RecipeError
from colonnade.launcher.recipe.stages import (
    TrainingStage,
    field_in_force,
    training_stages,
)
from colonnade.launcher.recipe.tables import Recipe, StageConfig

TRAIN = ("seed", "seq_len", "global_batch", "ramp_batch", "ramp_steps", "freeze")
NEW_PATH = {"path", "column"}  # the checkpoint identifies data by content


def fixed_fields(recipe: Recipe) -> dict[str, Any]:
    """Returns the fields in force that a stage keeps once it has begun, with their values.

    The layout, the optimizer's numbers, precision, the number of steps and reports may change. The
    paths of tokenizer and data files may change, too: the checkpoint identifies them by content.
    """
    fields: dict[str, Any] = {f"train.{f}": getattr(recipe.train, f) for f in TRAIN}
    model = recipe.model.model_dump()
    fields |= {f"model.{f}": v for f, v in model.items() if recipe.model.unused(f) is None}
    # the dtypes of `parallel.parallelize.storage_dtype`, which would import torch
    fields["train.precision"] = "fp64" if recipe.train.precision == "fp64" else "fp32 or bf16"
    # Fields that follow from others do so in muP's base as well: a field that is given at the
    # value it had by default changes the base alone.
    if base := recipe.model.base():
        fields |= {f"model.mup_base.{f}": value for f, value in base.model_dump().items()}
    fields["optimizer.name"] = recipe.optimizer.name
    fields["data.validation"] = recipe.data.held_out
    fields["data.packing"] = recipe.data.packing
    fields["data.sources"] = len(recipe.data.sources)
    for number, source in enumerate(recipe.data.sources):
        known = source.model_dump(exclude=NEW_PATH).items()
        fields |= {f"data.sources.{number}.{f}": value for f, value in known}
    return fields


def check_resumable(saved: Recipe, wanted: Recipe, step: int) -> None:
    """Checks that a run that is at `step` may go on with another recipe.

    Raises:
        RecipeError: it would change a training stage that has begun; lists all such fields.
    """
    before, after = training_stages(saved), training_stages(wanted)
    faults: dict[str, Fault] = {}
    for stage in before:
        if stage.index and stage.first >= step:
            break  # it has not begun
        if stage.index >= len(after):
            field, text = f"stage.{stage.index}", "the run has trained this stage already"
            faults.setdefault(field, Fault(field, None, f"{text}; give it as it was"))
            continue
        for fault in faults_of_stage(stage, after[stage.index], wanted, step):
            faults.setdefault(fault.field, fault)
    if faults:
        raise RecipeError(list(faults.values()))


def faults_of_stage(
    before: TrainingStage, after: TrainingStage, wanted: Recipe, step: int
) -> list[Fault]:
    """Returns a fault for every field that a stage which has begun has to keep and does not."""
    required, found = fixed_fields(before.recipe), fixed_fields(after.recipe)

    def named(field: str) -> str:
        if field == "data.validation" and after.recipe.data.validation_sources:
            field = "data.validation_sources"  # with which nothing is held out any more
        return field_in_force(wanted, before.index, field) if wanted.stage else field

    faults = [
        Fault(
            named(field),
            value,
            f"the run began with {required[field]!r}, and a run keeps its model, its optimizer and "
            f"the order of its data; leave it, or {alternative(wanted, field, value, step)}",
        )
        for field, value in found.items()
        if field in required and value != required[field]
    ]
    field, trained = f"stage.{before.index}.steps", min(before.stop, step) - before.first
    if wanted.stage and before.stop <= step and before.stop != after.stop:
        remedy = f"the stage has ended after {before.steps} steps; leave it as it was"
        faults.append(Fault(field, after.steps, remedy))
    elif wanted.stage and after.steps < trained:
        remedy = f"the run has trained {trained} steps of it; set it to at least that"
        faults.append(Fault(field, after.steps, remedy))
    return faults


def alternative(wanted: Recipe, field: str, value: object, step: int) -> str:
    """Returns what else a user may do who wants a run to go on with another value of a field: add a
    training stage where a stage may have it, or else start a new run."""
    table, _, name = field.partition(".")
    tables = StageConfig().tables()
    settable = table in tables and name.partition(".")[0] in type(tables[table]).model_fields
    if not settable or wanted.train.ramp_batch is not None:  # stages have no ramp
        return "start a new run"
    if field == "data.validation" and wanted.data.validation_sources:
        field, value = "data.validation_sources.0.path", wanted.data.validation_sources[0].path
    new = len(wanted.stage) or 1
    first = "" if wanted.stage else f"stage.0.steps={max(step, 1)} "
    written = "..." if isinstance(value, tuple) else value
    return f"add a stage that has it: {first}stage.{new}.steps=N stage.{new}.{field}={written}"
