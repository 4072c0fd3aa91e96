"""Functions of the step: learning rate, batch size, and the samples that a rank reads."""

import math
from collections.abc import Container, Iterator

from colonnade.launcher.recipe.stages import TrainingStage
from colonnade.launcher.recipe.tables import OptimizerConfig, TrainConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    Linear warm-up, then `cosine` to `min_lr` (arXiv:1608.03983, eq. 5), `wsd` constant with a
    linear decay to `min_lr` over the last `decay` steps (arXiv:2404.06395, section 4), or
    `constant`.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    low, span = config.min_lr, config.lr - config.min_lr
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return low + span * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "wsd":
        decay = config.decay or 1
        return low + span * min(1.0, (steps - step) / decay)
    return config.lr


def batch_size(config: TrainConfig, step: int) -> int:
    """The rows of step `step`: `ramp_batch`, which grows in units of itself to `global_batch`."""
    if config.ramp_batch is None or step >= config.ramp_steps:
        return config.global_batch
    units = (config.global_batch - config.ramp_batch) // config.ramp_batch
    return config.ramp_batch * (1 + units * step // config.ramp_steps)


def first_sample(config: TrainConfig, step: int) -> int:
    """The number of samples of all earlier steps, which depends only on the recipe.

    It is the index of the first sample of step `step`.
    """
    ramp = min(step, config.ramp_steps) if config.ramp_batch else 0
    after_ramp = (step - ramp) * config.global_batch
    if not ramp:
        return after_ramp
    assert config.ramp_batch is not None
    units = (config.global_batch - config.ramp_batch) // config.ramp_batch
    return config.ramp_batch * (ramp + floor_sum(ramp, units, config.ramp_steps)) + after_ramp


def floor_sum(n: int, a: int, m: int) -> int:
    """The sum of ⌊a i / m⌋ over i = 0 … n − 1, computed without a loop over i.

    Lattice points under a line are counted by exchanging the axes, as in Euclid's algorithm
    (Graham, Knuth and Patashnik, Concrete Mathematics, section 3.5).
    """
    total, b = 0, 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b, m, a = top // m, top % m, a, m


def stage_learning_rate(stage: TrainingStage, step: int) -> float:
    """The learning rate of step `step` of a run, in this training stage."""
    within = step - stage.schedule_first
    return learning_rate(stage.recipe.optimizer, within, stage.schedule_steps)


def samples_of_step(stage: TrainingStage, step: int) -> range:
    """The samples of step `step` (from 0) of a run, on all ranks together."""
    first = stage.samples + first_sample(stage.recipe.train, step - stage.first)
    return range(first, first + batch_size(stage.recipe.train, step))


def micro_batches(stage: TrainingStage, step: int, rank: int, ranks: int) -> list[list[int]]:
    """The samples of one step of a run that data rank `rank` of `ranks` reads, a list per
    micro-batch.

    Together the data ranks train on each sample of the step exactly once, whatever their number.
    The samples of a micro-batch are consecutive, so that no balance group is split. All ranks read
    as many micro-batches: where the ranks do not divide them, some ranks read the last one of the
    step, behind those on which they train (`trained_micro_batches`).
    """
    config, samples = stage.recipe.train, samples_of_step(stage, step)
    size, rows = config.micro_batch, len(samples)
    last, passes = rows // size - 1, config.passes_of_rank(rows, ranks)
    numbers = (min(i * ranks + rank, last) for i in range(passes))
    starts = (samples.start + number * size for number in numbers)
    return [list(range(start, start + size)) for start in starts]


def trained_micro_batches(stage: TrainingStage, step: int, rank: int, ranks: int) -> int:
    """How many of the `micro_batches`, from the first on, data rank `rank` of `ranks` trains on."""
    config = stage.recipe.train
    return len(range(rank, batch_size(config, step) // config.micro_batch, ranks))


def reading_plan(
    stage: TrainingStage, start: int, rank: int, ranks: int, skipped: Container[int] = ()
) -> Iterator[list[int]]:
    """The samples of every micro-batch of this data rank from step `start` of a run on, to the end
    of the stage, in order, but for steps (from 0) that are skipped."""
    for step in range(start, stage.stop):
        if step not in skipped:
            yield from micro_batches(stage, step, rank, ranks)


def describe_stage(stage: TrainingStage) -> str:
    """Describes a training stage: its steps, its batch, its learning rate, what it freezes."""
    train, optimizer = stage.recipe.train, stage.recipe.optimizer
    frozen = f", frozen: {' '.join(train.freeze)}" if train.freeze else ""
    return (
        f"stage {stage.index}, steps {stage.first + 1:,} to {stage.stop:,}: {train.global_batch:,} "
        f"rows of {train.seq_len:,} tokens, {optimizer.schedule} lr {optimizer.lr:g}{frozen}"
    )
