"""Reports of a training job: its start, its steps, its validations, its end."""

from collections.abc import Mapping
from typing import Any

from colonnade.launcher.checkpoint import newest, step_folder
from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.errors import UserError
from colonnade.launcher.generate import extend
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import Job
from colonnade.launcher.train.lines import write_below
from colonnade.launcher.train.losses import validate_loss, validation_key
from colonnade.launcher.train.monitor import Monitor
from colonnade.launcher.train.schedule import batch_size, describe_stage
from colonnade.launcher.train.step import Result
from colonnade.launcher.train.summary import (
    describe_data,
    describe_job,
    describe_offload,
    start_facts,
)
from colonnade.parallel.optimizer import OffloadedAdamW, Optimizer


def open_monitor(job: Job, recipe: Recipe) -> Monitor | None:
    """Opens the monitor and records the start on rank 0, and returns None on others; if it fails,
    all ranks raise. `recipe` is the run's."""
    opened: list[Monitor] = []  # not the result of `on_rank_zero`, which would broadcast it

    def open_on_this_rank() -> None:
        opened.append(Monitor(job.run, recipe, job.stage, job.step, job.events.attempt))
        opened[0].metrics = job.watch.metrics
        opened[0].say(describe_job(job.recipe, job.world, job.data, job.step, job.steps))
        if offload := describe_offload(job.optimizer, job.world.device):
            opened[0].say(offload)
        if len(job.stages) > 1:
            opened[0].say(describe_stage(job.stage))
        checkpoint = step_folder(job.checkpoints, job.step).name if job.step else None
        job.events.start(job.step, checkpoint, **start_facts(job.recipe, job.world))

    on_rank_zero(lambda: write_below(job.run, open_on_this_rank))
    return opened[0] if opened else None


def report_stage(job: Job, monitor: Monitor | None, seconds: float) -> None:
    """Records that a training stage begins, whose start took so many seconds. Collective."""

    def report() -> None:
        assert monitor is not None  # on rank 0
        monitor.begin_stage(job.stage)
        layout = job.recipe.parallel.layout(job.world.size)
        job.events.stage(job.step, job.stage.index, layout, seconds)
        monitor.say(describe_stage(job.stage))
        monitor.say(describe_data(job.recipe, job.data))
        if offload := describe_offload(job.optimizer, job.world.device):
            monitor.say(offload)

    on_rank_zero(lambda: write_below(job.run, report))


def report_step(job: Job, monitor: Monitor | None, result: Result | None) -> UserError | None:
    """Records a step on rank 0; returns a write error, which `sync_status` raises on all ranks.
    Without a result the run has passed over the step."""
    seconds, parts = job.timer.restart()
    if job.watch.ranks and result is not None:
        job.watch.ranks.add(parts)
    if monitor is None:
        return None

    def record() -> None:
        if result is None:  # the row takes the place of that of the spike
            monitor.record({"step": job.step, "passed_over": True})
        else:
            record_step(job, monitor, result, seconds, parts)

    try:
        write_below(job.run, record)
    except UserError as error:
        return error
    return None


def report_startup(job: Job, monitor: Monitor | None) -> UserError | None:
    """Says and records on rank 0, after the first step of an attempt, what its start took; returns
    a write error, as `report_step`."""
    startup, job.startup = job.startup, None
    if startup is None or monitor is None:
        return None
    startup.mark("first step")
    monitor.say(startup.describe())
    parts = {name: round(seconds, 3) for name, seconds in startup.parts.items()}
    try:
        write_below(job.run, lambda: job.events.add("first step", job.step, parts=parts))
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


def record_step(
    job: Job, monitor: Monitor, result: Result, seconds: float, parts: Mapping[str, float]
) -> None:
    """Records a step's metrics: `tokens` are all, `trained_tokens` those with a loss; `seconds` and
    `parts` are its times."""
    recipe, report = job.recipe.train, result.report
    tokens = batch_size(recipe, job.step - 1) * recipe.seq_len
    metrics: dict[str, Any] = {
        "step": job.step,
        **({"stage": job.stage.index} if len(job.stages) > 1 else {}),
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
    metrics |= report.extras | offload_metrics(job.optimizer, result)
    if result.skipped:
        metrics["skipped"] = True
        monitor.say(
            f"step {job.step}: loss {report.loss}, gradient norm {report.grad_norm}: not finite, "
            f"step skipped ({job.bad_steps} in a row, {recipe.bad_steps} end the run)"
        )
    metrics |= monitor.loads.observe(job.step, report.loads, result.skipped, monitor.say)
    monitor.step(metrics, tokens, job.world)


def offload_metrics(optimizer: Optimizer, result: Result) -> dict[str, float]:
    """Returns what rank 0's update of offloaded state did: groups that the device updated, seconds,
    and those that were predicted, where host and device work at once; nothing of a skipped step."""
    if not isinstance(optimizer, OffloadedAdamW) or optimizer.updated is None or result.skipped:
        return {}
    updated = optimizer.updated
    metrics: dict[str, float] = {
        "offload_device_groups": updated.device_groups,
        "offload_update_s": round(updated.seconds, 6),
    }
    if updated.predicted is not None:
        metrics["offload_predicted_s"] = round(updated.predicted, 6)
    return metrics


def run_validation(job: Job, monitor: Monitor | None) -> None:
    """Computes the validation loss, and records it on rank 0. Collective."""
    rows, count = job.data.validation, job.recipe.train.validate_rows
    if rows is None or count == 0:
        return
    lengths = job.data.tokenizer.byte_lengths() if job.data.tokenizer else None
    rng_key = validation_key(job.recipe.train.seed, job.step)
    with job.watch.phase("validation"), job.timer.part("validation"):
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
