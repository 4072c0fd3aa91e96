"""Learning rates, batch ramps and the samples of each rank, against brute force."""

import math

import pytest
import torch

from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import OptimizerConfig, Recipe, TrainConfig
from colonnade.launcher.train.schedule import (
    batch_size,
    first_sample,
    floor_sum,
    learning_rate,
    micro_batches,
    reading_plan,
)

RAMP = TrainConfig(steps=50, global_batch=48, micro_batch=2, ramp_batch=8, ramp_steps=23)
(STAGE,) = training_stages(Recipe(train=RAMP))


def test_cosine_equals_torch() -> None:
    """Warm-up and cosine against torch's own schedulers in sequence."""
    config = OptimizerConfig(lr=0.3, warmup=7, min_lr=0.03)
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 7, 1.0, total_iters=6),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 33, eta_min=0.03),
    ]
    sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[7])
    for step in range(40):
        ours = learning_rate(config, step, 40)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        optimizer.step()
        sequence.step()


def test_wsd_is_stable_then_linear() -> None:
    config = OptimizerConfig(lr=1.0, schedule="wsd", warmup=2, decay=4, min_lr=0.2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:7] == [1.0] * 5
    assert rates[7:] == pytest.approx([0.8, 0.6, 0.4])


def test_constant_stays() -> None:
    config = OptimizerConfig(lr=0.1, schedule="constant", warmup=1)
    assert {learning_rate(config, step, 9) for step in range(9)} == {0.1}


def test_ramp_grows_in_units_to_the_global_batch() -> None:
    sizes = [batch_size(RAMP, step) for step in range(RAMP.steps)]
    assert sizes[0] == 8
    assert sizes == sorted(sizes)
    assert set(sizes) == {8, 16, 24, 32, 40, 48}
    assert all(size == 48 for size in sizes[23:])
    assert [first_sample(RAMP, step) for step in range(50)] == [sum(sizes[:s]) for s in range(50)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_sample_is_read_once_whatever_the_ranks(ranks: int) -> None:
    for step in (0, 5, 40):
        by_rank = [micro_batches(STAGE, step, rank, ranks) for rank in range(ranks)]
        read = sorted(sample for batches in by_rank for micro in batches for sample in micro)
        first = first_sample(RAMP, step)
        assert read == list(range(first, first + batch_size(RAMP, step)))
        assert all(
            micro == list(range(micro[0], micro[0] + 2)) for batches in by_rank for micro in batches
        )


def test_plan_resumes_where_it_stopped() -> None:
    complete = list(reading_plan(STAGE, 0, 1, 2))
    resumed = list(reading_plan(STAGE, 20, 1, 2))
    assert complete[-len(resumed) :] == resumed
    assert math.isclose(sum(map(len, complete)) * 2, first_sample(RAMP, 50))


def test_floor_sum_equals_the_loop() -> None:
    for n, a, m in torch.randint(1, 60, (300, 3), generator=torch.Generator().manual_seed(0)):
        numbers = int(n), int(a), int(m)
        assert floor_sum(*numbers) == sum(int(a) * i // int(m) for i in range(int(n))), numbers


def test_a_ramp_of_any_length_is_summed_at_once() -> None:
    """By brute force this would not end."""
    long = TrainConfig(steps=2**40, global_batch=2**20, ramp_batch=1, ramp_steps=2**40)
    half = first_sample(long, 2**40) / 2**60
    assert half == pytest.approx(0.5, rel=1e-5)
