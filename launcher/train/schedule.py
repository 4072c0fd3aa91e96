"""What changes from step to step: learning rate, batch size, and the samples a rank reads."""

import math
from collections.abc import Iterator

from colonnade.launcher.recipe.tables import OptimizerConfig, TrainConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`.

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
    """Rows of step `step`: `ramp_batch`, growing in units of itself to `global_batch`."""
    if config.ramp_batch is None or step >= config.ramp_steps:
        return config.global_batch
    units = (config.global_batch - config.ramp_batch) // config.ramp_batch
    return config.ramp_batch * (1 + units * step // config.ramp_steps)


def first_sample(config: TrainConfig, step: int) -> int:
    """How many samples all earlier steps took: a function of the recipe alone."""
    ramp = min(step, config.ramp_steps) if config.ramp_batch else 0
    rest = (step - ramp) * config.global_batch
    if not ramp:
        return rest
    assert config.ramp_batch is not None
    units = (config.global_batch - config.ramp_batch) // config.ramp_batch
    return config.ramp_batch * (ramp + floor_sum(ramp, units, config.ramp_steps)) + rest


def floor_sum(n: int, a: int, m: int) -> int:
    """Sum of ⌊a i / m⌋ over i = 0 … n − 1, without a loop over i.

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


def micro_batches(config: TrainConfig, step: int, rank: int, ranks: int) -> list[list[int]]:
    """Samples of one step that data rank `rank` of `ranks` reads, a list per micro-batch.

    Together the ranks read each sample of the step once, whatever their number; a micro-batch is a
    run of neighbours, so that balance groups stay whole.
    """
    first, size = first_sample(config, step), config.micro_batch
    count = batch_size(config, step) // (size * ranks)
    starts = (first + (i * ranks + rank) * size for i in range(count))
    return [list(range(start, start + size)) for start in starts]


def reading_plan(config: TrainConfig, start: int, rank: int, ranks: int) -> Iterator[list[int]]:
    """The samples of every micro-batch from step `start` on."""
    for step in range(start, config.steps):
        yield from micro_batches(config, step, rank, ranks)
