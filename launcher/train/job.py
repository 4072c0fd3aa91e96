"""What one rank does from start to end: build, restore, train, save, report."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.checkpoint import load, newest, prune, save, step_folder
from colonnade.launcher.checkpoint.tensors import named_tensors
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.ranks import settle_determinism
from colonnade.launcher.cluster.signals import StopSignal, stop_signal
from colonnade.launcher.data import Data, open_data
from colonnade.launcher.data.prefetch import Prefetcher
from colonnade.launcher.errors import UserError
from colonnade.launcher.generate import extend
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.folder import adopt
from colonnade.launcher.train.monitor import Monitor
from colonnade.launcher.train.plot import plot_loss
from colonnade.launcher.train.schedule import batch_size, micro_batches, reading_plan
from colonnade.launcher.train.step import (
    Result,
    agreed,
    raise_if,
    train_step,
    validate_loss,
)
from colonnade.models.decoder import Decoder
from colonnade.models.shapes import measure
from colonnade.parallel.engine import Engine, all_reduced
from colonnade.parallel.materialise import materialise
from colonnade.parallel.mesh import build_mesh, data_rank
from colonnade.parallel.optimizer import Optimizer, build_optimizer
from colonnade.parallel.parallelize import COMPUTE, parallelize
from colonnade.parallel.world import World


@dataclass
class Job:
    """Everything one rank holds while it trains."""

    recipe: Recipe
    run: Path
    world: World
    mesh: DeviceMesh
    model: Decoder
    optimizer: Optimizer
    data: Data
    reader: Prefetcher | None = None
    step: int = 0  # steps done
    bad: int = 0  # non-finite steps in a row

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.run / "checkpoints"

    def save(self) -> None:
        """Write a checkpoint of this step and drop the oldest. Collective."""
        state = {
            "step": self.step,
            "bad_steps": self.bad,
            "updates": self.optimizer.updates,
            "data": (self.reader or self.data.train).state(),
        }
        tensors = named_tensors(self.model, self.optimizer)
        save(step_folder(self.checkpoints, self.step), tensors, state)
        keep = self.recipe.checkpoint.keep
        on_rank_zero(lambda: writing(self.checkpoints, lambda: prune(self.checkpoints, keep)))

    def restore(self) -> None:
        """Continue from the newest checkpoint. Collective."""
        folder = on_rank_zero(lambda: newest(self.checkpoints))
        if folder is None:
            raise UserError(f"{self.run}: no complete checkpoint to resume from; train it anew")
        state = load(folder, named_tensors(self.model, self.optimizer))
        if state["step"] > self.recipe.train.steps:
            raise UserError(
                f"train.steps = {self.recipe.train.steps}: the run is at step {state['step']} "
                "already; set train.steps above it"
            )
        self.optimizer.updates = state["updates"]
        self.step, self.bad = state["step"], state["bad_steps"]
        self.data.train.load_state(state["data"])


def build_model(
    recipe: Recipe, world: World, prepare: Callable[[Decoder], object] | None = None
) -> tuple[DeviceMesh, Decoder, Optimizer]:
    """Mesh, sharded model from the seed, optimizer with its first state.

    `prepare` gets the model before it is sharded and filled.
    """
    mesh = build_mesh(recipe.parallel, world)
    with torch.device("meta"):
        model = Decoder(recipe.model, recipe.train.loss_chunk)
    if prepare is not None:
        prepare(model)
    parallelize(model, mesh, recipe)
    materialise(model, world.device, recipe.train.seed)
    compute = COMPUTE[recipe.train.precision]
    return mesh, model, build_optimizer(model, recipe.optimizer, compute)


def build(recipe: Recipe, run: Path, world: World) -> Job:
    """Everything a rank needs to train a recipe."""
    settle_determinism(recipe.train.deterministic)
    return Job(recipe, run, world, *build_model(recipe, world), open_data(recipe))


def run_job(
    recipe: Recipe,
    run: Path,
    world: World,
    resume: bool = False,
    until: int | None = None,
    answers: bool = False,
) -> int:
    """Train to the end, to step `until`, or to a signal. Collective over all ranks.

    `answers` as in `stop_signal`.

    Returns:
        the number of the signal that stopped it, or 0.
    """
    job = build(recipe, run, world)
    if resume:
        job.restore()
        on_rank_zero(lambda: adopt(run))
    monitor = open_monitor(job)
    with stop_signal(world.size, answers) as stop:
        end = min(until or recipe.train.steps, recipe.train.steps)
        number = train_loop(job, monitor, stop, end)
        if job.step == recipe.train.steps and not number:
            finish(job, monitor)
    if monitor:
        monitor.close()
        close_run(job)
    return number


def open_monitor(job: Job) -> Monitor | None:
    """Rank 0's monitor; all ranks stop if it cannot be made."""
    box: list[Monitor] = []

    def make() -> None:
        box.append(Monitor(job.run, job.recipe, job.step))
        box[0].say(introduction(job))

    on_rank_zero(lambda: writing(job.run, make))
    return box[0] if box else None


def introduction(job: Job) -> str:
    """What is about to run, where, and on what data."""
    recipe, world = job.recipe, job.world
    size = measure(recipe.model, recipe.train.seq_len)
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    text = f"{recipe.name}: {size.parameters:,} parameters on {ranks}, {world.device.type}"
    if world.device.type == "cpu" and torch.cuda.is_available():
        text += f" (GPUs here: {torch.cuda.device_count()}; with at most a rank each they serve)"
    text += f"\n{job.data.train.describe()}"
    if job.step:
        text += f"\nresumed after step {job.step} of {recipe.train.steps}"
    if recipe.data.validation and recipe.train.validate_rows and job.data.validation is None:
        text += "\nno validation: the data are too few documents, or streamed, to hold rows out"
    return text


def train_loop(job: Job, monitor: Monitor | None, stop: StopSignal, end: int) -> int:
    """Steps until `end` or a signal on any rank; a checkpoint at the last one always."""
    recipe, (rank, ranks) = job.recipe, data_rank(job.mesh)
    engine = Engine(job.model, job.optimizer, job.mesh, job.world.device)
    plan = reading_plan(recipe.train, job.step, rank, ranks)
    number = 0
    with Prefetcher(job.data.train, plan) as job.reader:
        if job.step < end:
            first = len(micro_batches(recipe.train, job.step, rank, ranks))
            agreed(partial(raise_if, job.reader.upcoming_error(first)), job.world.device)
        while job.step < end and not number:
            samples = micro_batches(recipe.train, job.step, rank, ranks)
            batches = list(islice(job.reader, len(samples)))
            result = train_step(engine, batches, samples, recipe, job.step)
            job.step += 1
            job.bad = job.bad + 1 if result.skipped else 0
            number, unreadable = agree(job, stop, reported(job, monitor, result), end)
            if job.bad >= recipe.train.bad_steps:
                give_up(job, result)
            every = recipe.checkpoint.every
            if job.step == end or number or unreadable or (every and job.step % every == 0):
                job.save()
            if unreadable:
                raise unreadable
            every = recipe.train.validate_every
            if every and job.step % every == 0 and job.step < recipe.train.steps and not number:
                check(job, monitor)
            if monitor:
                monitor.restart_clock()
    return number


def agree(
    job: Job, stop: StopSignal, trouble: UserError | None, end: int
) -> tuple[int, UserError | None]:
    """The signal that any rank noted, or 0; and why the next step's data cannot be read, if so.

    All ranks raise what rank 0 could not write.
    """
    unreadable = None
    if job.reader is not None and job.step < end:
        coming = micro_batches(job.recipe.train, job.step, *data_rank(job.mesh))
        unreadable = job.reader.upcoming_error(len(coming))
    noted = [float(stop.number), float(trouble is not None), float(unreadable is not None)]
    number, failed, stuck = all_reduced(noted, job.world.device, dist.ReduceOp.MAX)
    if failed:
        raise UserError(on_rank_zero(lambda: str(trouble)))
    stop.agreed = number > 0
    if stuck:
        why = next(why for why in on_all_ranks(lambda: unreadable) if why)
        unreadable = UserError(f"{why} (the run is saved after step {job.step})")
    return int(number), unreadable


def reported(job: Job, monitor: Monitor | None, result: Result) -> UserError | None:
    """Report a step on rank 0; returns what went wrong, for all ranks to raise."""
    if monitor is None:
        return None
    try:
        writing(job.run, lambda: report(job, monitor, result))
    except UserError as trouble:
        return trouble
    return None


def writing(path: Path, action: Callable[[], object]) -> None:
    """Run `action`, which writes below `path`; what the disk refuses is a UserError."""
    try:
        action()
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path}: {error.strerror}; free space or mend the "
            f"disk of {path.absolute()}, then resume the run"
        ) from error


def give_up(job: Job, result: Result) -> None:
    """End a run of bad steps: say why on all ranks, and what to try."""
    last, recipe = on_rank_zero(lambda: newest(job.checkpoints)), job.recipe
    found = result.report
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
    raise UserError(
        f"step {job.step}: loss {found.loss}, gradient norm {found.grad_norm}: not finite for "
        f"{job.bad} steps in a row, so the run stops (train.bad_steps = {recipe.train.bad_steps}); "
        f"{kept}. Lower optimizer.lr = {recipe.optimizer.lr}, lengthen optimizer.warmup = "
        f"{recipe.optimizer.warmup}, or set train.precision = 'fp32'"
    )


def report(job: Job, monitor: Monitor, result: Result) -> None:
    """One line of metrics. `tokens` counts this step's, `trained_tokens` those with a loss."""
    recipe, found = job.recipe.train, result.report
    tokens = batch_size(recipe, job.step - 1) * recipe.seq_len
    metrics: dict[str, Any] = {
        "step": job.step,
        "loss": found.loss,
        "grad_norm": found.grad_norm,
        "lr": result.lr,
        "tokens": tokens,
        "trained_tokens": found.tokens,
    }
    if found.balance:
        metrics["balance"] = found.balance
    metrics |= found.extras
    if result.skipped:
        metrics["skipped"] = True
        monitor.say(
            f"step {job.step}: loss {found.loss}, gradient norm {found.grad_norm}: not finite, "
            f"step skipped ({job.bad} in a row, {recipe.bad_steps} end the run)"
        )
    monitor.step(metrics, tokens, job.world)


def check(job: Job, monitor: Monitor | None) -> None:
    """Validate and record it."""
    rows, count = job.data.validation, job.recipe.train.validate_rows
    if rows is None or count == 0:
        return
    device = job.world.device
    lengths = job.data.tokenizer.byte_lengths() if job.data.tokenizer else None
    loss, bits = validate_loss(job.model, rows, job.recipe, job.mesh, device, lengths)

    def tell() -> None:
        assert monitor is not None
        metrics = {"step": job.step, "validation_loss": loss}
        text = f"validation  loss {loss:.4f}"
        if bits is not None:
            metrics["validation_bits_per_byte"] = bits
            text += f", {bits:.3f} bits per byte"
        monitor.record(metrics)
        monitor.say(f"{text} at step {job.step}")

    on_rank_zero(lambda: writing(job.run, tell))


def finish(job: Job, monitor: Monitor | None) -> None:
    """The end of a complete run: last validation and a sample of the model's text."""
    check(job, monitor)
    count, tokenizer = job.recipe.train.sample, job.data.tokenizer
    if not count or tokenizer is None:
        return
    start = tokenizer.encode(["def "])[0]
    made = extend(job.model, start, count, job.recipe.train.seq_len, None, job.world.device)
    text = "def " + tokenizer.decode(made)
    path = job.run / "sample.txt"
    on_rank_zero(lambda: writing(path, lambda: path.write_text(text + "\n", encoding="utf-8")))
    if monitor:
        monitor.say(f"sample\n{text}\n")


def close_run(job: Job) -> None:
    """Rank 0's last words: the plot, the folder, and how to go on."""
    try:
        if plot := plot_loss(job.run):
            print(f"plot        {plot}")
    except OSError as error:
        print(f"no plot     {job.run / 'loss.png'}: {error.strerror}")
    print(f"run         {job.run}")
    if job.step < job.recipe.train.steps:
        ranks = f" --nproc {job.world.size}" if job.world.size > 1 else ""
        print(
            f"stopped after step {job.step}, saved; go on with: "
            f"colonnade train --resume {job.run}{ranks}"
        )
