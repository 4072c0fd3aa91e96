"""Runs a training job on one rank: builds or restores it, and trains its stages, step by step."""

import signal
import time
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from colonnade.launcher.checkpoint import Choice, step_folder
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.failures.position import Position
from colonnade.launcher.cluster.signals import StopSignal, signal_name, stop_signal
from colonnade.launcher.data.prefetch import Prefetcher
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.attempt import Attempt, attempt_of
from colonnade.launcher.train.events import Events
from colonnade.launcher.train.folder import ResumePoint, adopt
from colonnade.launcher.train.guard.replay import replay_if_due
from colonnade.launcher.train.guard.rewind import rewind
from colonnade.launcher.train.guard.spikes import Spike
from colonnade.launcher.train.job import Job, build, change_stage
from colonnade.launcher.train.lines import write_below
from colonnade.launcher.train.monitor import Monitor
from colonnade.launcher.train.order import NOTHING_ASKED, Order
from colonnade.launcher.train.reports import (
    finish,
    open_monitor,
    report_stage,
    report_startup,
    report_step,
    run_validation,
    stop_for_bad_steps,
)
from colonnade.launcher.train.saves import (
    check_folder,
    find_checkpoint,
    restore,
    save,
    save_is_due,
    stage_after,
    start_from_weights,
    wait_for_copies,
)
from colonnade.launcher.train.schedule import micro_batches, reading_plan, trained_micro_batches
from colonnade.launcher.train.step import Result, raise_if, sync_errors, train_step
from colonnade.launcher.train.summary import print_summary
from colonnade.launcher.train.timeline import timeline_of
from colonnade.launcher.train.watch.watch import watching
from colonnade.models.config import CARDS
from colonnade.parallel.engine import all_reduced
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.world import World


def run_job(
    recipe: Recipe,
    run: Path,
    world: World,
    resume: bool = False,
    order: Order = NOTHING_ASKED,
    attempt: Attempt | None = None,
) -> int:
    """Trains to the last step, to that of the order, or to a signal. Collective over all ranks.

    With `resume` it goes on from the order's source. `attempt` is made where it is not given.

    Returns:
        the number of the signal that stopped it, or 0.
    """
    attempt, events = attempt or attempt_of(run, world), Events()
    on_rank_zero(lambda: write_below(run, lambda: events.open(run)))
    saving = (signal.SIGUSR1,) if recipe.checkpoint.usr1 == "save" else ()
    watched = watching(recipe, run, world, events, order.command)
    with closing(events), events.errors_recorded(), watched as watch:
        if resume:
            job = resumed_job(recipe, run, world, events, order.source)
            # only after the checkpoint was loaded under the new recipe may that replace the old one
            on_rank_zero(lambda: adopt(run))
        else:
            job = build(recipe, run, world, events)
            if recipe.train.init is not None:
                start_from_weights(job)
        attempt.startup.mark("model")
        job.startup = attempt.startup
        follow(job, attempt.reporter.position)
        job.watch, job.timer.waits = watch, watch.waits
        monitor = open_monitor(job, recipe)
        # within, because a rank that lost its peer after a signal is ended by `stop_signal`
        with (
            stop_signal(world.size, attempt.announce, saving) as stop,
            events.errors_recorded(),
            attempt.reporter.recording(),
        ):
            end = min(order.until or job.steps, job.steps)
            signal_number = train_stages(job, monitor, stop, end)
        finished = job.step == job.steps and not signal_number
        reason = signal_name(signal_number) or ("finished" if finished else "until")
        on_rank_zero(lambda: write_below(run, lambda: events.stop(job.step, reason)))
    if monitor:
        monitor.close()
        print_summary(run, job.steps, world, job.step)
    return signal_number


def resumed_job(
    recipe: Recipe, run: Path, world: World, events: Events, source: ResumePoint
) -> Job:
    """Builds the job of the training stage that comes after a checkpoint, and loads that.
    Collective.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it is past the last step.
    """
    choice = find_checkpoint(run, source)
    stages = training_stages(recipe)
    stage = stage_after(stages, choice)
    job = build(recipe, run, world, events, stage)
    restore(job, choice)
    return job


def follow(job: Job, position: Position) -> None:
    """Tells `position` which part of a step the job is in, and which sub-block's pass."""
    job.timer.position = position
    row = job.recipe.model.symbols
    position.name = lambda t: f"{t} ({CARDS[row[t]].title})" if t < len(row) else f"{t} (MTP)"
    for wiring in job.model.wirings():
        wiring.visit = position.visit


def train_stages(job: Job, monitor: Monitor | None, stop: StopSignal, end: int) -> int:
    """Trains one stage after the other until step `end` or a signal on any rank, which is returned,
    or 0. Every stage begins from the checkpoint of the one before, whether the job was stopped in
    between or not. After a spike of the loss the run goes on from a checkpoint before it.
    Collective."""
    while True:
        with job.saver:
            signal_number, spike = train_loop(job, monitor, stop, min(end, job.stage.stop))
            if job.step == job.steps and not signal_number and not spike:
                finish(job, monitor)
            elif job.step == job.stage.stop and not signal_number and not spike:
                run_validation(job, monitor)
        if spike:
            rewind(job, monitor, spike)
            follow(job, job.timer.position)
        if signal_number or job.step >= end:
            return signal_number
        if spike:
            continue
        start = time.monotonic()
        change_stage(job, job.stages[job.stage.index + 1])
        follow(job, job.timer.position)
        restore(job, Choice(step_folder(job.checkpoints, job.step), {}))
        report_stage(job, monitor, time.monotonic() - start)


def train_loop(
    job: Job, monitor: Monitor | None, stop: StopSignal, end: int
) -> tuple[int, Spike | None]:
    """Trains a stage until step `end` or a signal on any rank, and saves after the last step, or
    until a spike of the loss, after which it does not save.

    Collective. Returns the number of the signal, or 0, and the spike, or None.
    """
    recipe, (rank, ranks) = job.recipe, data_rank(job.mesh)  # among the ranks along data axes
    skipped = {step - 1 for step in job.guard.skipped}
    plan = reading_plan(job.stage, job.step, rank, ranks, skipped)
    signal_number = 0
    with closing(Prefetcher(job.data.train, plan)) as job.reader:
        if job.step < end:
            count = len(upcoming_samples(job))
            sync_errors(partial(raise_if, job.reader.upcoming_error(count)), job.world.device)
        job.timer.restart()
        while job.step < end and not signal_number:
            job.timer.position.begin_step(job.step + 1)
            result = run_step(job) if job.step not in skipped else None
            job.step += 1
            job.events.step = job.step
            if result is not None:
                job.bad_steps = job.bad_steps + 1 if result.skipped else 0
            write_error = report_step(job, monitor, result) or report_startup(job, monitor)
            # every rank gets the same status here, so all take the same branches below
            signal_number, read_error, wanted = sync_status(job, stop, write_error, end)
            job.watch.step_ended(job, monitor)
            if result is not None and (spike := spike_of(job, result)):
                return signal_number, spike
            if result is not None and job.bad_steps >= recipe.train.bad_steps:
                stop_for_bad_steps(job, result)
            every = recipe.checkpoint.every
            scheduled = every and job.step % every == 0
            last = job.step == end or signal_number or read_error
            if last or scheduled or wanted:
                save(job, wait=bool(last))
            if read_error:
                raise read_error
            every = recipe.train.validate_every
            scheduled = every and job.step % every == 0
            # after the last step of a stage `train_stages` validates
            if scheduled and job.step < job.stage.stop and not signal_number:
                run_validation(job, monitor)
    return signal_number, None


def upcoming_samples(job: Job) -> list[list[int]]:
    """Returns the samples of this rank's micro-batches in the next step; none if the run passes
    over it."""
    if job.step + 1 in job.guard.skipped:
        return []
    return micro_batches(job.stage, job.step, *data_rank(job.mesh))


def run_step(job: Job) -> Result:
    """Reads the batches of the next step, trains on them, and replays one if that is due.
    Collective."""
    assert job.reader is not None
    samples = upcoming_samples(job)
    with job.timer.part("data"):
        batches = list(islice(job.reader, len(samples)))
    write, wait = partial(write_below, job.run), partial(wait_for_copies, job)
    trained = trained_micro_batches(job.stage, job.step, *data_rank(job.mesh))
    with timeline_of(job.step + 1, job.recipe, job.engine.passes, job.run, write):
        result = train_step(
            job.engine, batches, samples, job.stage, job.step, job.timer, wait, trained
        )
    replay_if_due(job, batches)
    return result


def spike_of(job: Job, result: Result) -> Spike | None:
    """Returns the spike if the step that has just been trained is one; the same on every rank."""
    report, guard = result.report, job.recipe.guard
    if not report.tokens:
        return None
    return job.guard.observe(guard, job.step, report.loss, report.grad_norm)


def sync_status(
    job: Job, stop: StopSignal, write_error: UserError | None, end: int
) -> tuple[int, UserError | None, bool]:
    """All-reduces (MAX) signals, errors and wishes after a step, so that all ranks act alike.

    Returns:
        the number of the signal that any rank received, or 0; the error of any rank in reading the
        data of the next step, or None; and whether a checkpoint is wanted now, by a signal, by the
        file `SAVE` in the run's folder, or because `checkpoint.minutes` are over.

    Raises:
        UserError: on every rank, rank 0's `write_error`, or why a checkpoint could not be saved.
    """
    read_error = None
    if job.reader is not None and job.step < end:
        upcoming = upcoming_samples(job)
        with job.timer.part("data"):
            read_error = job.reader.upcoming_error(len(upcoming))
    wanted, stop.save = stop.save, False  # before all else, as a signal may come at any moment
    if job.world.is_rank_zero:
        try:
            check_folder(job)
            wanted = save_is_due(job) or wanted
        except UserError as error:
            write_error = write_error or error
    flags = (write_error is not None, read_error is not None, job.saver.failed, wanted)
    status = [float(stop.number), *map(float, flags)]
    number, write_failed, read_failed, save_failed, save_wanted = all_reduced(
        status, job.world.device, dist.ReduceOp.MAX
    )
    if write_failed:
        raise UserError(on_rank_zero(lambda: str(write_error)))
    if save_failed:
        job.saver.finish()  # raises the same on every rank
    stop.agreed = number > 0
    if read_failed:
        first = next(error for error in on_all_ranks(lambda: read_error) if error)
        read_error = UserError(f"{first} (the run is saved after step {job.step})")
    return int(number), read_error, bool(save_wanted)
