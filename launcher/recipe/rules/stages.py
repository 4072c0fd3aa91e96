"""Rules on the training stages of a run together; other rules see the recipe of each by itself."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import Rules
from colonnade.launcher.recipe.stages import training_stages
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


@RULES.add("train.timeline", "stage")
def timeline_of_stages(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The step of the timeline is one of the run."""
    last = training_stages(r)[-1].stop
    if r.train.timeline is not None and r.train.timeline > last:
        yield Fault("train.timeline", r.train.timeline, f"the run has {last} steps; give 1..{last}")
