"""Runs a training job on one rank: builds, restores, trains, saves and reports."""

import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.checkpoint import Saver, newest, step_folder
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.ranks import settle_determinism
from colonnade.launcher.cluster.signals import StopSignal, signal_name, stop_signal
from colonnade.launcher.data import Data, open_data
from colonnade.launcher.data.prefetch import Prefetcher
from colonnade.launcher.errors import UserError
from colonnade.launcher.generate import extend
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import CHECKPOINTS
from colonnade.launcher.train.events import Events
from colonnade.launcher.train.folder import NEWEST, ResumePoint, adopt
from colonnade.launcher.train.lines import write_below
from colonnade.launcher.train.monitor import Monitor
from colonnade.launcher.train.saves import (
    check_folder,
    lock_of,
    open_saver,
    restore,
    save,
    save_is_due,
    start_from_weights,
    wait_for_copies,
)
from colonnade.launcher.train.schedule import batch_size, micro_batches, reading_plan
from colonnade.launcher.train.step import (
    Result,
    raise_if,
    sync_errors,
    train_step,
    validate_loss,
    validation_key,
)
from colonnade.launcher.train.summary import describe_job, print_summary, start_facts
from colonnade.launcher.train.timeline import timeline_of
from colonnade.launcher.train.timer import Timer
from colonnade.models.decoder import Decoder
from colonnade.parallel.engine import Engine, all_reduced
from colonnade.parallel.materialise import materialise
from colonnade.parallel.mesh import build_expert_mesh, build_mesh, data_rank
from colonnade.parallel.optimizer import Optimizer, build_optimizer
from colonnade.parallel.parallelize import COMPUTE, parallelize
from colonnade.parallel.pipeline.build import build_passes, local_stages, pipeline_stages
from colonnade.parallel.world import World


@dataclass
class Job:
    """The state of a training job on one rank."""

    recipe: Recipe
    run: Path
    world: World
    engine: Engine
    data: Data
    saver: Saver
    events: Events  # written by rank 0 alone
    lock: tuple[int, int] | None = None  # the file that this job has locked
    reader: Prefetcher | None = None
    step: int = 0  # completed steps
    bad_steps: int = 0  # consecutive non-finite steps up to now
    last_save: float = field(default_factory=time.monotonic)  # when the last save began
    timer: Timer = field(default_factory=Timer)

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks of the job, by axes."""
        return self.engine.mesh

    @property
    def model(self) -> Decoder:
        """The model, or this rank's stages of it."""
        return self.engine.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of this rank's shards."""
        return self.engine.optimizer

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.run / CHECKPOINTS


def build_engine(
    recipe: Recipe, world: World, prepare: Callable[[Decoder], object] | None = None
) -> Engine:
    """Builds the mesh, the sharded model or this rank's stages of it, with weights from the seed,
    the optimizer, and what runs their passes.

    Args:
        prepare: a function that changes the model before it is sharded and materialised.
    """
    mesh = build_mesh(recipe.parallel, world)
    stages = pipeline_stages(recipe.model, recipe.parallel, recipe.train.seq_len)
    with torch.device("meta"):
        local = local_stages(stages, recipe.parallel, mesh.get_local_rank("pp"))
        model = Decoder(recipe.model, recipe.train.loss_chunk, local)
    if prepare is not None:
        prepare(model)
    parallelize(model, mesh, recipe, build_expert_mesh(recipe.parallel, world))
    materialise(model, world.device, recipe.train.seed)
    optimizer = build_optimizer(model, recipe.optimizer, COMPUTE[recipe.train.precision])
    passes = build_passes(model, stages, mesh, recipe, world.device)
    return Engine(model, optimizer, mesh, world.device, passes)


def build_model(
    recipe: Recipe, world: World, prepare: Callable[[Decoder], object] | None = None
) -> tuple[DeviceMesh, Decoder, Optimizer]:
    """Returns mesh, model and optimizer of `build_engine`."""
    engine = build_engine(recipe, world, prepare)
    return engine.mesh, engine.model, engine.optimizer


def build(recipe: Recipe, run: Path, world: World, events: Events | None = None) -> Job:
    """Builds the job of a recipe on this rank, at step 0; without `events` it records none."""
    settle_determinism(recipe.train.deterministic)
    events = events or Events()
    engine, data = build_engine(recipe, world), open_data(recipe)
    saver = open_saver(recipe, run, events)
    return Job(recipe, run, world, engine, data, saver, events, lock_of(run))


def run_job(
    recipe: Recipe,
    run: Path,
    world: World,
    resume: bool = False,
    until: int | None = None,
    announce: bool = False,
    source: ResumePoint = NEWEST,
) -> int:
    """Trains to the last step, to step `until`, or to a signal. Collective over all ranks.

    `announce` as in `stop_signal`; with `resume` it goes on from `source`.

    Returns:
        the number of the signal that stopped it, or 0.
    """
    events = Events()
    on_rank_zero(lambda: write_below(run, lambda: events.open(run)))
    saving = (signal.SIGUSR1,) if recipe.checkpoint.usr1 == "save" else ()
    with closing(events), events.errors_recorded():
        job = build(recipe, run, world, events)
        if resume:
            restore(job, source)
            # only after the checkpoint was loaded under the new recipe may that replace the old one
            on_rank_zero(lambda: adopt(run))
        elif recipe.train.init is not None:
            start_from_weights(job)
        monitor = open_monitor(job)
        # within, because a rank that lost its peer after a signal is ended by `stop_signal`
        with stop_signal(world.size, announce, saving) as stop, events.errors_recorded(), job.saver:
            end = min(until or recipe.train.steps, recipe.train.steps)
            signal_number = train_loop(job, monitor, stop, end)
            finished = job.step == recipe.train.steps and not signal_number
            if finished:
                finish(job, monitor)
        reason = signal_name(signal_number) or ("finished" if finished else "until")
        on_rank_zero(lambda: write_below(run, lambda: events.stop(job.step, reason)))
    if monitor:
        monitor.close()
        print_summary(run, recipe, world, job.step)
    return signal_number


def open_monitor(job: Job) -> Monitor | None:
    """Opens the monitor and records the start on rank 0, and returns None on others; if it fails,
    all ranks raise."""
    opened: list[Monitor] = []  # not the result of `on_rank_zero`, which would broadcast it

    def open_on_this_rank() -> None:
        opened.append(Monitor(job.run, job.recipe, job.step, job.events.attempt))
        opened[0].say(describe_job(job.recipe, job.world, job.data, job.step))
        checkpoint = step_folder(job.checkpoints, job.step).name if job.step else None
        job.events.start(job.step, checkpoint, **start_facts(job.recipe, job.world))

    on_rank_zero(lambda: write_below(job.run, open_on_this_rank))
    return opened[0] if opened else None


def train_loop(job: Job, monitor: Monitor | None, stop: StopSignal, end: int) -> int:
    """Trains until step `end` or a signal on any rank, and saves after the last step.

    Collective. Returns the number of the signal, or 0.
    """
    recipe, (rank, ranks) = job.recipe, data_rank(job.mesh)  # among the ranks along data axes
    plan = reading_plan(recipe.train, job.step, rank, ranks)
    signal_number = 0
    with closing(Prefetcher(job.data.train, plan)) as job.reader:
        if job.step < end:
            count = len(micro_batches(recipe.train, job.step, rank, ranks))
            sync_errors(partial(raise_if, job.reader.upcoming_error(count)), job.world.device)
        job.timer.restart()
        while job.step < end and not signal_number:
            samples = micro_batches(recipe.train, job.step, rank, ranks)
            with job.timer.part("data"):
                batches = list(islice(job.reader, len(samples)))
            write = partial(write_below, job.run)
            with timeline_of(job.step + 1, recipe, job.engine.passes, job.run, write):
                wait = partial(wait_for_copies, job)
                result = train_step(job.engine, batches, samples, recipe, job.step, job.timer, wait)
            job.step += 1
            job.events.step = job.step
            job.bad_steps = job.bad_steps + 1 if result.skipped else 0
            write_error = report_step(job, monitor, result)
            # every rank gets the same status here, so all take the same branches below
            signal_number, read_error, wanted = sync_status(job, stop, write_error, end)
            if job.bad_steps >= recipe.train.bad_steps:
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
            # `finish` validates after the last step
            if scheduled and job.step < recipe.train.steps and not signal_number:
                run_validation(job, monitor)
    return signal_number


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
        upcoming = micro_batches(job.recipe.train, job.step, *data_rank(job.mesh))
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


def report_step(job: Job, monitor: Monitor | None, result: Result) -> UserError | None:
    """Records a step on rank 0; returns a write error, which `sync_status` raises on all ranks."""
    if monitor is None:
        return None
    try:
        write_below(job.run, lambda: record_step(job, monitor, result))
    except UserError as error:
        return error
    return None


def stop_for_bad_steps(job: Job, result: Result) -> None:
    """Raises UserError on all ranks, after too many bad steps, with remedies. Collective."""
    last, recipe = on_rank_zero(lambda: newest(job.checkpoints)), job.recipe
    report, limit = result.report, recipe.train.bad_steps
    saved = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
    raise UserError(
        f"step {job.step}: loss {report.loss}, gradient norm {report.grad_norm}: not finite for "
        f"{job.bad_steps} steps in a row, so the run stops (train.bad_steps = {limit}); "
        f"{saved}. Lower optimizer.lr = {recipe.optimizer.lr}, lengthen optimizer.warmup = "
        f"{recipe.optimizer.warmup}, or set train.precision = 'fp32'"
    )


def record_step(job: Job, monitor: Monitor, result: Result) -> None:
    """Records a step's metrics: `tokens` are all, `trained_tokens` those with a loss."""
    recipe, report = job.recipe.train, result.report
    seconds, parts = job.timer.restart()
    tokens = batch_size(recipe, job.step - 1) * recipe.seq_len
    metrics: dict[str, Any] = {
        "step": job.step,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": result.lr,
        "tokens": tokens,
        "trained_tokens": report.tokens,
        "seconds": round(seconds, 6),
        "parts": {name: round(part, 6) for name, part in parts.items()},
    }
    if report.balance:
        metrics["balance"] = report.balance
    metrics |= report.extras
    if result.skipped:
        metrics["skipped"] = True
        monitor.say(
            f"step {job.step}: loss {report.loss}, gradient norm {report.grad_norm}: not finite, "
            f"step skipped ({job.bad_steps} in a row, {recipe.bad_steps} end the run)"
        )
    metrics |= monitor.loads.observe(job.step, report.loads, result.skipped, monitor.say)
    monitor.step(metrics, tokens, job.world)


def run_validation(job: Job, monitor: Monitor | None) -> None:
    """Computes the validation loss, and records it on rank 0. Collective."""
    rows, count = job.data.validation, job.recipe.train.validate_rows
    if rows is None or count == 0:
        return
    lengths = job.data.tokenizer.byte_lengths() if job.data.tokenizer else None
    rng_key = validation_key(job.recipe.train.seed, job.step)
    with job.timer.part("validation"):
        loss, bits = validate_loss(job.engine, rows, job.recipe, lengths, rng_key)

    def record() -> None:
        assert monitor is not None  # on rank 0
        metrics = {"step": job.step, "validation_loss": loss}
        text = f"validation  loss {loss:.4f}"
        if bits is not None:
            metrics["validation_bits_per_byte"] = bits
            text += f", {bits:.3f} bits per byte"
        monitor.record(metrics)
        job.events.validation(job.step, loss, job.timer.parts["validation"])
        monitor.say(f"{text} at step {job.step}")

    on_rank_zero(lambda: write_below(job.run, record))


def finish(job: Job, monitor: Monitor | None) -> None:
    """Ends a complete run: validates, and writes a sample of the model's text. Collective."""
    run_validation(job, monitor)
    count, tokenizer = job.recipe.train.sample, job.data.tokenizer
    if not count or tokenizer is None:
        return
    prompt = tokenizer.encode(["def "])[0]
    passes, length = job.engine.passes, job.recipe.train.seq_len
    generated = extend(passes, prompt, count, length, None)
    text = "def " + tokenizer.decode(generated)
    path = job.run / "sample.txt"
    on_rank_zero(lambda: write_below(path, lambda: path.write_text(text + "\n", encoding="utf-8")))
    if monitor:
        monitor.say(f"sample\n{text}\n")
