"""`train` and `resume`: check a recipe, and run it on this host or as one rank of a larger job.

Torch is imported when a run starts, so that a mistake in a recipe is reported at once.
"""

import math
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.environment import RankEnvironment, may_restart, restart_count
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.stages import TrainingStage, training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.run_files import METRICS, RECIPE
from colonnade.launcher.train.folder import (
    ResumePoint,
    newest_step,
    open_existing,
    open_named,
    open_new,
    run_of,
    saved_recipe,
    step_in,
)
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.resumable import check_resumable
from colonnade.launcher.train.schedule import describe_stage, first_sample


@dataclass(frozen=True)
class Run:
    """A run on disk: its folder, and the metrics in it."""

    path: Path
    status: int  # 0, or 128 + the signal that stopped it

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one object per step, and one per validation."""
        return read_metrics(self.path / METRICS)

    @property
    def losses(self) -> list[float]:
        """The training loss of every step; NaN where it was not finite."""
        losses = (row["loss"] for row in self.metrics if "loss" in row)
        return [math.nan if loss is None else loss for loss in losses]

    def summary(self) -> dict[str, Any]:
        """The run's folder, its exit status, its last step, and the last value of each metric.

        The loads of experts are left out, of which there are thousands in a large model, and of the
        routers that collapsed all are named.
        """
        last: dict[str, Any] = {}
        for row in self.metrics:
            collapsed = last.get("collapsed", {}) | row.get("collapsed", {})
            last |= {name: value for name, value in row.items() if name != "loads"}
            last |= {"collapsed": collapsed} if collapsed else {}
        return {"run": str(self.path), "status": self.status, **last}


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int = 1,
    runs: str | Path = "runs",
    run: str | Path | None = None,
    automatic: bool = False,
    until: int | None = None,
    restarts: int = 0,
) -> Run:
    """Trains a recipe, in a new folder or in that of a run, which it makes or goes on with.

    Under torchrun every rank makes the same call, and `nproc` is ignored.

    Args:
        recipe: a recipe, the path of one, or the name of one that is shipped.
        overrides: `table.field=value`, as on the command line.
        nproc: ranks to start on this host.
        runs: folder in which the run gets a folder `NAME-TIME`, unless `run` names one.
        run: the run's folder. The same call again goes on from its newest checkpoint.
        automatic: go on from the newest checkpoint that is whole, past damaged ones.
        until: save and stop after this step; the schedules stay those of `train.steps`.
        restarts: how often the `nproc` ranks are started again after one of them has failed.

    Raises:
        UserError: a mistake in the recipe or its data; RecipeError lists all faults at once.

    Example:
        >>> from colonnade import train
        >>> run = train("quickstart", ["train.steps=20"], nproc=2)  # doctest: +SKIP
        >>> run.losses[-1] < run.losses[0]  # doctest: +SKIP
        True
    """
    environment, named = RankEnvironment.from_environment(), None if run is None else Path(run)
    step = 0 if named is None else newest_step(named)
    valid = valid_recipe(recipe, overrides, environment, nproc, step)
    ignore_early_requests(valid)
    if run is None and (restart_count() or may_restart()):
        raise UserError(
            f"this job is started again after a failure (restart {restart_count()} so far), and "
            "would begin anew: name its run with --run-dir DIR, so that a restart goes on with it"
        )
    from colonnade.launcher.train.order import Order
    from colonnade.launcher.train.start import start

    opened = (
        partial(open_new, valid, Path(runs)) if named is None else partial(open_named, valid, named)
    )
    order = Order(ResumePoint(None, automatic), until, step, restarts)
    return start(valid, environment, nproc, opened, order)


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int = 1,
    automatic: bool = False,
    until: int | None = None,
    restarts: int = 0,
) -> Run:
    """Continues a run from its newest checkpoint or from a given one, on any number of ranks.

    Later checkpoints than the one it goes on from are set aside (`step-N.aside`).

    Args:
        run: the run's folder, or one of its checkpoints.
        overrides: changed fields, for example `train.steps=200`.
        automatic: go on from the newest checkpoint that is whole, past damaged ones.
        restarts: as of `train`.

    Raises:
        UserError: no run or no complete checkpoint there, or a mistake in the recipe.
    """
    folder, checkpoint = run_of(Path(run))
    if checkpoint is not None and may_restart():
        raise UserError(
            f"--resume {run}: torchrun may start these ranks again, and each start would go back "
            "to this checkpoint; go back to it first (train --resume CHECKPOINT --until its next "
            "step, without --max-restarts), then give the run's folder"
        )
    if checkpoint is not None and restart_count():
        print("restarted: the run goes on from its newest checkpoint", file=sys.stderr)
        checkpoint = None  # the job's first start has gone back to it
    saved = saved_recipe(folder)
    environment = RankEnvironment.from_environment()
    step = newest_step(folder) if checkpoint is None else step_in(Path(checkpoint).name)
    recipe = valid_recipe(folder / RECIPE, overrides, environment, nproc, step, resumed=True)
    check_resumable(saved, recipe, step)
    ignore_early_requests(recipe)
    from colonnade.launcher.train.order import Order
    from colonnade.launcher.train.start import start

    order = Order(ResumePoint(checkpoint, automatic), until, step, restarts)
    return start(recipe, environment, nproc, partial(open_existing, recipe, folder), order)


def ignore_early_requests(recipe: Recipe) -> None:
    """Ignores SIGUSR1 outside of training where it asks for a checkpoint: it must not end a job
    that is starting or drawing its plots."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if recipe.checkpoint.usr1 == "save" and in_main_thread:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def valid_recipe(
    recipe: Recipe | str | Path,
    overrides: Sequence[str],
    environment: RankEnvironment | None,
    nproc: int,
    step: int = 0,
    resumed: bool = False,
) -> Recipe:
    """Loads and validates a recipe for the ranks of this job, or for `nproc` ranks to be started;
    fields that it leaves open are those of `train.init`, unless it is that of a `resumed` run. The
    run is at `step`.

    Rank 0 prints to stderr which fields of the file the overrides leave without effect, and which
    were changed in proportion to `train.steps`.

    Raises:
        UserError: a mistake in the recipe; RecipeError lists all faults at once.
    """
    size = environment.size if environment else nproc
    if not isinstance(recipe, Recipe):
        first = environment is None or environment.rank == 0
        report = partial(print, file=sys.stderr) if first else None
        fields_of = None if resumed else fields_of_init
        return load_recipe(recipe, overrides, size, report, fields_of, step)
    if overrides:
        raise UserError("overrides go with a recipe's name or path; change a Recipe by model_copy")
    if faults := validate(recipe, size):
        raise RecipeError(faults)
    return recipe


def fields_of_init(init: str) -> dict[str, dict[str, Any]]:
    """Returns the tables of a recipe that follow from `train.init`."""
    from colonnade.launcher.weights.source import fields_of  # imports torch, which takes seconds

    try:
        return fields_of(Path(init))
    except UserError as mistake:
        raise UserError(f"train.init = {init!r}: {mistake}") from None


def describe(
    recipe: Recipe | str | Path, overrides: Sequence[str] = (), *, nproc: int = 1
) -> dict[str, Any]:
    """The size of a recipe's model, its tokens and FLOPs, without building it; checks its data.

    Raises:
        UserError: a mistake in the recipe or its data.
    """
    environment = RankEnvironment.from_environment()
    size = environment.size if environment else nproc
    recipe = valid_recipe(recipe, overrides, environment, nproc)
    from colonnade.launcher.data import check_data
    from colonnade.models.shapes import measure

    data, stages = check_data(recipe), training_stages(recipe)
    shapes = [measure(stage.recipe.model, stage.recipe.train.seq_len) for stage in stages]
    tokens = [tokens_of(stage) for stage in stages]
    flops = sum(n * shape.flops_per_token for n, shape in zip(tokens, shapes, strict=True))
    shape, train = shapes[0], stages[0].recipe.train
    return {
        "recipe": recipe.name,
        "sub-blocks": len(recipe.model.symbols),
        "parameters": shape.parameters,
        "active parameters": shape.active,
        **({"stages": "; ".join(map(describe_stage, stages))} if recipe.stage else {}),
        "training FLOPs per token": shape.flops_per_token,
        "tokens per step": train.global_batch * train.seq_len,
        "tokens in all": sum(tokens),
        "training FLOPs in all": float(flops),
        **{axis: degree for axis, degree in stages[0].recipe.parallel.degrees(size).items()},
        "data": "; ".join(data),
    }


def tokens_of(stage: TrainingStage) -> int:
    """Returns the tokens of a training stage."""
    train = stage.recipe.train
    return first_sample(train, stage.steps) * train.seq_len
