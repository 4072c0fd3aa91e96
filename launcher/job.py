"""What one rank does from start to end: build, restore, train, save, report."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.checkpoint import load, newest, prune, save, step_folder
from colonnade.launcher.corpus import Batch, Data, open_data
from colonnade.launcher.corpus.prefetch import Prefetcher
from colonnade.launcher.errors import UserError
from colonnade.launcher.generation import extend
from colonnade.launcher.monitor import Monitor, peak_flops
from colonnade.launcher.optimizer import build_optimizer, named_tensors, start_state, updates_done
from colonnade.launcher.plot import plot_loss
from colonnade.launcher.ranks import settle_determinism
from colonnade.launcher.recipe import Recipe
from colonnade.launcher.schedule import batch_size, micro_batches, reading_plan
from colonnade.launcher.step import Result, over_ranks, train_step, validate_loss
from colonnade.launcher.together import on_first
from colonnade.models.decoder import Decoder
from colonnade.models.shapes import measure
from colonnade.parallel.materialise import materialise
from colonnade.parallel.mesh import build_mesh, data_rank
from colonnade.parallel.parallelize import parallelize
from colonnade.parallel.world import World


class StopSignal:
    """Ctrl-C or SIGTERM, noted now and obeyed at the end of the step, after saving."""

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, frame: Any) -> None:
        """Remember the signal; a launcher may pass the same one on twice."""
        self.number = number


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch Ctrl-C and SIGTERM for the length of the block (main thread only)."""
    stop, before = StopSignal(), {}
    with suppress(ValueError):  # not the main thread: the caller keeps its own handling
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Job:
    """Everything one rank holds while it trains."""

    recipe: Recipe
    run: Path
    here: World
    mesh: DeviceMesh
    model: Decoder
    optimizer: torch.optim.Optimizer
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
            "updates": updates_done(self.optimizer),
            "data": (self.reader or self.data.train).state(),
        }
        tensors = named_tensors(self.model, self.optimizer)
        save(step_folder(self.checkpoints, self.step), tensors, state)
        on_first(lambda: prune(self.checkpoints, self.recipe.checkpoint.keep))

    def restore(self) -> None:
        """Continue from the newest checkpoint. Collective."""
        folder = on_first(lambda: newest(self.checkpoints))
        if folder is None:
            raise UserError(f"{self.run}: no complete checkpoint to resume from; train it anew")
        start_state(self.optimizer, 0)
        state = load(folder, named_tensors(self.model, self.optimizer))
        start_state_step(self.optimizer, state["updates"])
        self.step, self.bad = state["step"], state["bad_steps"]
        self.data.train.load_state(state["data"])


def start_state_step(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set AdamW's count of updates."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def build(recipe: Recipe, run: Path, here: World) -> Job:
    """Mesh, sharded model from the seed, optimizer, data."""
    settle_determinism(recipe.train.deterministic)
    mesh = build_mesh(recipe.parallel, here)
    with torch.device("meta"):
        model = Decoder(recipe.model, recipe.train.loss_chunk)
    parallelize(model, mesh, recipe)
    materialise(model, here.device, recipe.train.seed)
    optimizer = build_optimizer(model, recipe.optimizer)
    start_state(optimizer, 0)
    return Job(recipe, run, here, mesh, model, optimizer, open_data(recipe))


def run_job(
    recipe: Recipe, run: Path, here: World, resume: bool = False, until: int | None = None
) -> int:
    """Train to the end, to step `until`, or to a signal. Collective over all ranks.

    Returns:
        the number of the signal that stopped it, or 0.
    """
    job = build(recipe, run, here)
    if resume:
        job.restore()
    monitor = open_monitor(job)
    with stop_signal() as stop:
        number = train_loop(
            job, monitor, stop, min(until or recipe.train.steps, recipe.train.steps)
        )
        if job.step == recipe.train.steps and not number:
            finish(job, monitor)
    if monitor:
        monitor.close()
        if plot := plot_loss(run):
            print(f"plot        {plot}")
        print(f"run         {run}")
        if job.step < recipe.train.steps:
            print(
                f"stopped after step {job.step}, saved; go on with: colonnade train --resume {run}"
            )
    return number


def open_monitor(job: Job) -> Monitor | None:
    """Rank 0's monitor; all ranks stop if it cannot be made."""
    box: list[Monitor] = []

    def make() -> None:
        box.append(Monitor(job.run, job.recipe, job.step))

    on_first(make)
    return box[0] if box else None


def train_loop(job: Job, monitor: Monitor | None, stop: StopSignal, end: int) -> int:
    """Steps until `end` or a signal on any rank; a checkpoint at the last one always."""
    recipe, (rank, ranks) = job.recipe, data_rank(job.mesh)
    plan = reading_plan(recipe.train, job.step, rank, ranks)
    flops = measure(recipe.model, recipe.train.seq_len).flops_per_token
    peak = peak_flops(torch.cuda.get_device_name()) if job.here.device.type == "cuda" else None
    number = 0
    with Prefetcher(job.data.train, plan) as job.reader:
        while job.step < end and not number:
            result = one_step(job, job.reader, rank, ranks)
            job.step += 1
            if monitor:
                report(job, monitor, result, flops, peak)
            number = int(over_ranks([stop.number], job.here.device, dist.ReduceOp.MAX)[0])
            last = job.step == end or number
            every = recipe.train.validate_every
            if every and job.step % every == 0 and job.step < recipe.train.steps:
                check(job, monitor)
            if last or (recipe.checkpoint.every and job.step % recipe.checkpoint.every == 0):
                job.save()
            if monitor:
                monitor.restart_clock()
    return number


def one_step(job: Job, batches: Iterator[Batch], rank: int, ranks: int) -> Result:
    """Train on the next global batch; too many bad steps in a row end the run."""
    count = len(micro_batches(job.recipe.train, job.step, rank, ranks))
    mine = list(islice(batches, count))
    result = train_step(job.model, job.optimizer, mine, job.recipe, job.step, job.here.device)
    job.bad = job.bad + 1 if result.skipped else 0
    if job.bad >= job.recipe.train.bad_steps:
        raise UserError(
            f"step {job.step + 1}: loss {result.loss}, gradient norm {result.grad_norm}: not "
            f"finite for {job.bad} steps in a row, so the run stops (train.bad_steps = "
            f"{job.recipe.train.bad_steps}); the last checkpoint is intact. "
            f"Lower optimizer.lr = {job.recipe.optimizer.lr}, lengthen optimizer.warmup = "
            f"{job.recipe.optimizer.warmup}, or set train.precision = 'fp32'"
        )
    return result


def report(job: Job, monitor: Monitor, result: Result, flops: int, peak: float | None) -> None:
    """One line of metrics. `tokens` counts all rows' tokens so far per step, masked ones too."""
    tokens = batch_size(job.recipe.train, job.step - 1) * job.recipe.train.seq_len
    metrics: dict[str, Any] = {
        "step": job.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": tokens,
        "trained_tokens": result.tokens,
    }
    if result.balance:
        metrics["balance"] = result.balance
    if result.skipped:
        metrics["skipped"] = True
        monitor.say(
            f"step {job.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, "
            f"step skipped ({job.bad} in a row, {job.recipe.train.bad_steps} end the run)"
        )
    if peak:
        seconds = time.perf_counter() - monitor.clock
        metrics["mfu"] = round(tokens * flops / seconds / (peak * job.here.size), 4)
    monitor.step(metrics, tokens)


def check(job: Job, monitor: Monitor | None) -> None:
    """Validate and record it."""
    rows, count = job.data.validation, job.recipe.train.validate_rows
    if rows is None or count == 0:
        return
    device = job.here.device
    lengths = job.data.tokenizer.byte_lengths() if job.data.tokenizer else None
    loss, bits = validate_loss(job.model, rows, job.recipe, job.mesh, device, lengths)
    if monitor:
        metrics = {"step": job.step, "validation_loss": loss}
        text = f"validation  loss {loss:.4f}"
        if bits is not None:
            metrics["validation_bits_per_byte"] = bits
            text += f", {bits:.3f} bits per byte"
        monitor.record(metrics)
        monitor.say(f"{text} at step {job.step}")


def finish(job: Job, monitor: Monitor | None) -> None:
    """The end of a complete run: last validation and a sample of the model's text."""
    check(job, monitor)
    count, tokenizer = job.recipe.train.sample, job.data.tokenizer
    if not count or tokenizer is None:
        return
    start = tokenizer.encode(["def "])[0]
    made = extend(job.model, start, count, job.recipe.train.seq_len, None, job.here.device)
    if monitor:
        text = "def " + tokenizer.decode(made)
        (job.run / "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(f"sample\n{text}\n")
