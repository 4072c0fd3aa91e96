"""Takes a job back to a checkpoint before a spike of the loss, to go on without its samples."""

import time
from pathlib import Path

from colonnade.launcher.checkpoint import Choice, step_folder
from colonnade.launcher.checkpoint.folders import checkpoints, step_of
from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.stages import stage_at
from colonnade.launcher.train.guard.spikes import Spike, SpikeGuard
from colonnade.launcher.train.job import Job, change_stage
from colonnade.launcher.train.lines import write_below
from colonnade.launcher.train.monitor import Monitor
from colonnade.launcher.train.saves import restore, save, stage_after
from colonnade.launcher.train.schedule import samples_of_step


def rewind(job: Job, monitor: Monitor | None, spike: Spike) -> None:
    """Loads the newest checkpoint before the steps that are passed over, and saves it again with
    their numbers, so that a job that goes on from it passes over them, too. Collective.

    Model, optimizer and data are built anew, exactly as when a run is resumed.

    Raises:
        UserError: there is no such checkpoint, or there were too many spikes shortly before.
    """
    start, guard = time.monotonic(), job.guard
    skipped = guard.skip(job.recipe.guard, spike)
    folder = checkpoint_before(job, spike, skipped)
    choice = Choice(folder, {})
    change_stage(job, stage_after(job.stages, choice))
    restore(job, choice)
    job.guard = SpikeGuard(job.guard.losses, guard.skipped, guard.spikes)
    job.bad_steps, job.events.step = 0, job.step
    seconds = time.monotonic() - start

    def report() -> None:
        assert monitor is not None  # on rank 0
        monitor.rewinds += 1
        monitor.begin_stage(job.stage)
        steps = f"steps {skipped[0]} to {skipped[-1]}" if len(skipped) > 1 else f"step {skipped[0]}"
        first, last = (
            samples_of_step(stage_at(job.stages, step), step - 1)
            for step in (skipped[0], skipped[-1])
        )
        samples = range(first.start, last.stop)
        job.events.rewind(job.step, spike.step, spike.loss, skipped, samples, seconds)
        monitor.say(
            f"{spike.describe()}; the run went back to step {job.step} and passes over {steps}, "
            f"samples {samples[0]} to {samples[-1]}"
        )

    on_rank_zero(lambda: write_below(job.run, report))
    save(job, wait=True)


def checkpoint_before(job: Job, spike: Spike, skipped: range) -> Path:
    """Returns the newest checkpoint before the steps that are passed over. Collective.

    Raises:
        UserError: there is none.
    """

    def newest_step() -> int:
        steps = (step_of(path) for path in checkpoints(job.checkpoints))
        return max((step for step in steps if step is not None and step < skipped[0]), default=0)

    step = on_rank_zero(newest_step)
    if not step:
        raise UserError(
            f"{spike.describe()}, and there is no checkpoint before step {skipped[0]} to go back "
            "to, so the run stops. Begin it anew with a lower optimizer.lr, a longer "
            "optimizer.warmup or a lower checkpoint.every, or with guard.spike = 0"
        )
    return step_folder(job.checkpoints, step)
