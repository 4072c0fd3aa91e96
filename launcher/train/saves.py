"""Saves a job and restores it: what a checkpoint of a run holds, and when one is due."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from colonnade.launcher.checkpoint import (
    Choice,
    Save,
    Saver,
    choose,
    load,
    prune,
    read_state,
    set_aside,
    step_folder,
)
from colonnade.launcher.checkpoint.folders import checkpoints, step_of
from colonnade.launcher.checkpoint.tensors import changing_names, named_tensors
from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.stages import TrainingStage
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import CHECKPOINTS, LOCK, SAVE
from colonnade.launcher.train.events import Events
from colonnade.launcher.train.folder import ResumePoint
from colonnade.launcher.train.guard.spikes import SpikeGuard
from colonnade.launcher.train.lines import write_below
from colonnade.launcher.weights.fill import fill
from colonnade.launcher.weights.source import open_weights
from colonnade.models.records import matches, records_of

if TYPE_CHECKING:
    from colonnade.launcher.train.job import Job


def open_saver(stages: Sequence[TrainingStage], run: Path, events: Events) -> Saver:
    """Returns what saves a run's checkpoints, records them, and after each deletes old ones, but
    for those at the ends of training stages."""
    recipe, folder = stages[0].recipe, run / CHECKPOINTS
    settings, stops = recipe.checkpoint, [stage.stop for stage in stages[:-1]]

    def committed(save: Save) -> None:
        step = cast(int, step_of(save.folder))
        waited = save.blocked_so_far()
        write_below(run, lambda: events.save(step, waited, save.seconds, save.bytes))
        write_below(folder, lambda: prune(folder, settings.keep, settings.keep_every, stops))

    return Saver(settings.asynchronous, committed, recipe.parallel.timeout)


def save(job: "Job", wait: bool) -> None:
    """Begins a checkpoint of the job's step; with `wait`, or without a thread, completes it.
    Collective."""
    job.last_save = time.monotonic()
    state = {
        "step": job.step,
        "bad_steps": job.bad_steps,
        "updates": job.optimizer.updates,
        **({"before": job.before} if job.before else {}),
        **({"guard": guard} if (guard := job.guard.state()) else {}),
        "data": (job.reader or job.data.train).state(),
    }
    about = {
        "step": job.step,
        "recipe": job.recipe.name,
        "ranks": job.world.size,
        "layout": job.recipe.parallel.degrees(job.world.size),
        "torch": torch.__version__,
        "time": time.time(),
    }
    tensors = named_tensors(job.model, job.optimizer)
    folder = step_folder(job.checkpoints, job.step)
    with job.watch.phase("save"), job.timer.part("save"):
        job.saver.begin(folder, tensors, state, about, changing_names(job.model))
        if wait:
            job.saver.finish()


def wait_for_copies(job: "Job") -> None:
    """Returns when parameters and optimizer state may change: a save in flight has copied them."""
    if job.saver.copying:
        with job.timer.part("save"):
            job.saver.wait()


def lock_of(run: Path) -> tuple[int, int] | None:
    """Returns what identifies the lock's file, whatever its path; None where there is none."""
    try:
        stat = (run / LOCK).stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def check_folder(job: "Job") -> None:
    """Raises UserError if the run's folder is no longer the one that this job has locked."""
    if lock_of(job.run) != job.lock:
        raise UserError(
            f"{job.run}: the run's folder was removed, renamed or replaced while it trained; the "
            "run ends. Where it was renamed, resume it under its new name"
        )


def save_is_due(job: "Job") -> bool:
    """Returns whether somebody asked for a checkpoint by the file `SAVE`, which is deleted then, or
    `checkpoint.minutes` are over since the last one. Rank 0 calls it.

    Raises:
        UserError: the file cannot be deleted.
    """
    asked = job.run / SAVE
    if asked.is_file():
        write_below(job.run, lambda: asked.unlink(missing_ok=True))
        return True
    seconds = 60 * job.recipe.checkpoint.minutes
    return 0 < seconds <= time.monotonic() - job.last_save


def start_from_weights(job: "Job") -> None:
    """Fills the model from `train.init`, and says on rank 0 what was not loaded. Collective."""
    train = job.recipe.train
    sentences: list[str] = []
    with open_weights(Path(cast(str, train.init)), sentences.append) as weights:
        masters = job.optimizer.masters()
        kept = fill(job.model, weights, train.init_only, train.init_skip, masters)
        job.optimizer.write_weights()
        sentences.append(
            f"weights of {weights.folder}; "
            + (f"random: {', '.join(kept)}" if kept else "no tensor is random")
        )
    if job.world.is_rank_zero:
        print("\n".join(sentences), flush=True)


def find_checkpoint(run: Path, source: ResumePoint) -> Choice:
    """Returns the checkpoint from which a run goes on. Collective.

    Raises:
        UserError: there is none.
    """
    if source.checkpoint is not None:
        return Choice(Path(source.checkpoint), {})
    choice = choose(run / CHECKPOINTS, source.automatic)
    if choice.folder is None:
        raise UserError(f"{run}: no complete checkpoint to resume from; train it anew")
    return choice


def stage_after(stages: Sequence[TrainingStage], choice: Choice) -> TrainingStage:
    """Returns the training stage that goes on from a checkpoint: at the end of one the next.
    Collective.

    Raises:
        UserError: it is past the last step.
    """
    folder = cast(Path, choice.folder)
    step, last = on_rank_zero(lambda: read_state(folder)["step"]), stages[-1].stop
    if step > last:
        raise UserError(
            f"train.steps = {last}: the run is at step {step} already; set train.steps above it"
            if len(stages) == 1
            else f"the stages end at step {last}, and the run is at step {step} already; add one"
        )
    return next((stage for stage in stages if step < stage.stop), stages[-1])


def restore(job: "Job", choice: Choice) -> None:
    """Loads a checkpoint of the job's training stage, or of the end of the stage before, and sets
    later ones aside, which the run will make again. Collective.

    A parameter that the stage before had frozen has no state there: its state begins anew.
    """
    folder, stage = cast(Path, choice.folder), job.stage
    tensors = named_tensors(job.model, job.optimizer)
    begins = stage.index > 0 and on_rank_zero(lambda: read_state(folder)["step"]) == stage.first
    earlier = job.stages[stage.index - 1] if begins else stage
    began = frozen_names(earlier.recipe) - frozen_names(stage.recipe)
    missing = {f"optimizer.{name}" for name in began}
    tensors = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in missing}
    state = load(folder, tensors, partial=begins)
    frozen = frozen_names(stage.recipe)
    before = {name: count for name, count in state.get("before", {}).items() if name not in frozen}
    job.before = before | dict.fromkeys(sorted(began), state["updates"])
    job.optimizer.resume(state["updates"], job.before)
    job.step, job.bad_steps = state["step"], state["bad_steps"]
    job.guard = SpikeGuard.of(state.get("guard", {}))
    if earlier.order == stage.order:
        job.data.train.load_state(state["data"])
    passed = choice.passed
    on_rank_zero(lambda: write_below(job.checkpoints, lambda: set_later_aside(job, passed)))


def frozen_names(recipe: Recipe) -> set[str]:
    """Returns the canonical names of the parameters and buffers that a recipe freezes."""
    patterns = recipe.train.freeze
    return {name for name in records_of(recipe.model) if matches(name, patterns)}


def set_later_aside(job: "Job", passed: dict[Path, str]) -> None:
    """Renames the checkpoints after the job's step, so that no later start takes one of them."""
    for folder in checkpoints(job.checkpoints):
        step = step_of(folder)
        if step is not None and step > job.step:
            why = passed.get(folder, f"{folder.name} is later than step {job.step}")
            print(f"colonnade: {why}; it is now {set_aside(folder).name}", file=sys.stderr)
