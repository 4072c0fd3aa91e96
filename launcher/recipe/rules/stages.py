"""Rules on the training stages of a run together; other rules see the recipe of each by itself."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import Rules
from colonnade.launcher.recipe.stages import LONGEST, stage_at, training_stages
from colonnade.launcher.recipe.tables import Recipe

RULES = Rules()


@RULES.add("stage")
def stage_length(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every stage has a length, in steps or in tokens."""
    for index, stage in enumerate(r.stage):
        field = f"stage.{index}.steps"
        if stage.steps is None and stage.tokens is None:
            remedy = f"a stage needs its length; set it, or stage.{index}.tokens"
            yield Fault(field, None, remedy)
        elif stage.steps is not None and stage.tokens is not None:
            remedy = f"stage.{index}.tokens = {stage.tokens} says it already; leave one of both out"
            yield Fault(field, stage.steps, remedy)
    lengths = [stage.steps or 1 for stage in r.stage]
    if sum(lengths) > LONGEST:
        remedy = f"all stages together have at most {LONGEST:,} steps; make it shorter"
        yield Fault(f"stage.{lengths.index(max(lengths))}.steps", max(lengths), remedy)


@RULES.add("train.timeline", "stage")
def timeline_of_stages(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The step of the timeline is one of the run, in a stage that is a pipeline."""
    step = r.train.timeline
    if step is None or any(stage_length(r, world_size)):
        return
    stages = training_stages(r)
    last, stage = stages[-1].stop, stage_at(stages, step)
    if step > last:
        yield Fault("train.timeline", step, f"the run has {last} steps; give 1..{last}")
    elif stage.recipe.parallel.pp == 1:
        remedy = f"stage {stage.index}, which has that step, is no pipeline; give a step of one"
        yield Fault("train.timeline", step, remedy)
