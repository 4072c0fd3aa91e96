"""Runs jobs on the pool of ranks: equal losses, resuming, signals, bad steps, validation."""

import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from ranks import RankError, Ranks
from torch.optim.optimizer import register_optimizer_step_post_hook

from colonnade.launcher.cluster.signals import stop_signal
from colonnade.launcher.data import open_data
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.losses import validate_loss, validation_key
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.monitor import Monitor
from colonnade.launcher.train.order import Order
from colonnade.parallel import engine
from colonnade.parallel.world import World


def job(
    rank: int, size: int, recipe: Recipe, run: Path, resume: bool = False, until: int | None = None
) -> int:
    """Runs a job on one rank."""
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "recipe.toml").write_text(dump_recipe(recipe))
    return run_job(recipe, run, World(rank, size, torch.device("cpu")), resume, Order(until=until))


def losses(run: Path) -> list[float]:
    rows = read_metrics(run / "metrics.jsonl")
    return [value for row in rows for key, value in row.items() if "loss" in key]


def loads(run: Path) -> list[dict[str, list[int]]]:
    return [row["loads"] for row in read_metrics(run / "metrics.jsonl") if "loads" in row]


def test_losses_and_loads_do_not_depend_on_ranks(
    ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    for ranks in (ranks1, ranks2, ranks4):
        ranks.run(job, recipe(), tmp_path / str(ranks.size))
    expected = losses(tmp_path / "1")
    assert len(expected) == 8 + 1  # steps and the last validation
    assert losses(tmp_path / "2") == pytest.approx(expected, rel=1e-10)
    assert losses(tmp_path / "4") == pytest.approx(expected, rel=1e-10)
    assert loads(tmp_path / "4") == loads(tmp_path / "2") == loads(tmp_path / "1")
    for row in loads(tmp_path / "1"):
        assert list(row) == ["3"]  # the index of `E` in M-*E
        assert sum(row["3"]) == 8 * 16 * 2  # rows, tokens of a row, experts of a token
    assert len(loads(tmp_path / "1")) == 8


STATEFUL = (  # a checkpoint holds more than parameters: buffers, and keys of random draws
    "model.pattern=E-mTG",
    "model.router_bias=true",
    "model.router_bias_rate=0.1",
    "model.router_noise=0.5",
    "model.sigma_reparam=true",
    "model.delta_key_dim=4",
)


@pytest.mark.parametrize("overrides", [(), STATEFUL])
def test_a_resumed_run_equals_an_uninterrupted_one(
    ranks1: Ranks,
    ranks2: Ranks,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    overrides: tuple[str, ...],
) -> None:
    settings = recipe(*overrides)
    ranks2.run(job, settings, tmp_path / "uninterrupted")
    for name in ("same", "fewer"):
        ranks2.run(job, settings, tmp_path / name, False, 5)
    ranks2.run(job, settings, tmp_path / "same", True)
    ranks1.run(job, settings, tmp_path / "fewer", True)
    expected = losses(tmp_path / "uninterrupted")
    assert losses(tmp_path / "same") == expected
    assert losses(tmp_path / "fewer") == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("overrides", [(), STATEFUL, ("optimizer.name=muon",)])
def test_resuming_on_another_layout(
    ranks1: Ranks,
    ranks2: Ranks,
    ranks4: Ranks,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    overrides: tuple[str, ...],
) -> None:
    """Trains on one rank, then with tp=2, cp=2, ep on four ranks, cp=2 with tp=2, in pipelines of
    four ranks and of two with tp=2, then on one.

    The run also validates between its checkpoints.
    """
    overrides = (*overrides, "train.validate_every=2", "model.experts=4", "train.steps=10")
    ranks1.run(job, recipe(*overrides), tmp_path / "uninterrupted")
    run, tp, cp = tmp_path / "resumed", "parallel.tp=2", "parallel.cp=2"
    ranks1.run(job, recipe(*overrides), run, False, 2)
    ranks2.run(job, recipe(*overrides, tp), run, True, 3)
    ranks2.run(job, recipe(*overrides, cp), run, True, 4)
    ranks4.run(job, recipe(*overrides, "parallel.ep=4"), run, True, 5)
    ranks4.run(job, recipe(*overrides, "parallel.ep=2", "parallel.etp=1", tp), run, True, 6)
    ranks4.run(job, recipe(*overrides, cp, tp), run, True, 7)
    pp, micro = "parallel.pp=2", "train.micro_batch=1"
    ranks4.run(job, recipe(*overrides, "parallel.pp=4", micro), run, True, 8)
    ranks4.run(job, recipe(*overrides, pp, tp, "parallel.schedule=zb1p", micro), run, True, 9)
    ranks1.run(job, recipe(*overrides), run, True)
    assert losses(run) == pytest.approx(losses(tmp_path / "uninterrupted"), rel=1e-10)
    assert loads(run) == loads(tmp_path / "uninterrupted")


@contextmanager
def after_each_update(action: Callable[[int], object]) -> Iterator[None]:
    """Calls an action with the number of the step after each update of the optimizer."""
    steps = itertools.count(1)
    hook = register_optimizer_step_post_hook(lambda *_: action(next(steps)))
    try:
        yield
    finally:
        hook.remove()


def job_with_signal(rank: int, size: int, recipe: Recipe, run: Path) -> int:
    """Runs a job whose last rank gets SIGTERM in its third step."""

    def send_signal(step: int) -> None:
        if step == 3 and rank == size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with after_each_update(send_signal):
        return job(rank, size, recipe, run)


def test_a_signal_on_one_rank_saves_and_stops_all(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert ranks2.run(job_with_signal, recipe(), run) == [signal.SIGTERM] * 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    ranks2.run(job, recipe(), run, True)
    ranks2.run(job, recipe(), tmp_path / "uninterrupted")
    assert losses(run) == losses(tmp_path / "uninterrupted")


class LostPeerError(Exception):
    """The failure of a collective after another rank has ended."""


def fail_after_signal(ranks: int, agreed: bool, failure: type[Exception]) -> None:
    with stop_signal(ranks) as stop:
        signal.raise_signal(signal.SIGTERM)
        stop.agreed = agreed
        raise failure("raised by the test")


@pytest.mark.parametrize(
    ("ranks", "agreed", "failure", "status"),
    [
        (2, False, LostPeerError, -signal.SIGTERM),
        (1, False, LostPeerError, 1),
        (2, True, LostPeerError, 1),
        (2, False, UserError, 1),
    ],
)
def test_a_rank_that_lost_its_peer_ends_by_the_signal(
    ranks: int, agreed: bool, failure: type[Exception], status: int
) -> None:
    """After any other failure the rank ends by the exception, which is reported."""
    arguments = (ranks, agreed, failure)
    process = get_context("fork").Process(target=fail_after_signal, args=arguments)
    process.start()
    process.join(30)
    assert process.exitcode == status


def job_with_nan(rank: int, size: int, recipe: Recipe, run: Path, bad: set[int]) -> list[bool]:
    """Runs a job with a NaN gradient on rank 0 at the steps `bad`; returns which were skipped."""
    norm, steps = engine.gradient_norm, itertools.count()

    def gradient_norm(parameters: Iterable[torch.nn.Parameter], *stages: object) -> torch.Tensor:
        weights = list(parameters)
        if next(steps) in bad and rank == 0:
            weights[0].grad = weights[0].grad * float("nan")
        return norm(weights, *stages)

    engine.gradient_norm = gradient_norm
    try:
        job(rank, size, recipe, run)
    finally:
        engine.gradient_norm = norm
    return [bool(row.get("skipped")) for row in read_metrics(run / "metrics.jsonl") if "lr" in row]


def test_a_bad_step_is_skipped_on_all_ranks(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    skipped = ranks2.run(job_with_nan, recipe(), run, {2, 4})[0]
    assert skipped == [step in (2, 4) for step in range(8)]
    assert all(map(torch.isfinite, map(torch.tensor, losses(run))))


def test_too_many_bad_steps_end_the_run(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The message names the last good checkpoint, and the metrics record the bad steps."""
    run, limits = tmp_path / "run", ("train.bad_steps=3", "checkpoint.every=2")
    with pytest.raises(RankError, match=r"step 5: .* not finite for 3 .*step-00000004"):
        ranks2.run(job_with_nan, recipe(*limits), run, {2, 3, 4})
    skipped = [row.get("skipped", False) for row in read_metrics(run / "metrics.jsonl")]
    assert skipped == [False, False, True, True, True]


def printed_by_job(rank: int, size: int, recipe: Recipe, run: Path) -> str:
    """Runs a job on one rank; returns what it prints."""
    with redirect_stdout(StringIO()) as printed:
        job(rank, size, recipe, run)
    return printed.getvalue()


def test_a_collapsed_router_is_reported(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """One of three experts always has more than a third of the tokens' single choices."""
    settings = ("model.top_k=1", "train.collapse_share=0.34", "train.collapse_steps=2")
    printed, nothing = ranks2.run(printed_by_job, recipe(*settings), tmp_path / "run")
    (row,) = (r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "collapsed" in r)
    ((layer, event),) = row["collapsed"].items()
    line = f"step {row['step']}: the router of sub-block {layer} collapsed: "
    assert f"{line}{event['share']:.0%} of the tokens chose expert {event['expert']} " in printed
    assert printed.count("collapsed: ") == 1
    assert nothing == ""
    assert f"plot        {tmp_path / 'run' / 'loads.png'}" in printed
    assert (tmp_path / "run" / "loads.png").exists()


def job_with_full_disk(rank: int, size: int, recipe: Recipe, run: Path) -> int:
    """Runs a job in which the disk is full when the third line of metrics is written."""
    record, lines = Monitor.record, itertools.count()

    def refuse(self: Monitor, metrics: dict[str, object]) -> None:
        if next(lines) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        record(self, metrics)

    Monitor.record = refuse
    try:
        return job(rank, size, recipe, run)
    finally:
        Monitor.record = record


def test_a_full_disk_is_one_message_on_all_ranks(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(RankError) as failed:
        ranks2.run(job_with_full_disk, recipe(), tmp_path / "run")
    assert str(failed.value).count("UserError: cannot write") == 2


def test_a_finished_run_has_one_last_validation(
    ranks1: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    ranks1.run(job, recipe(), tmp_path / "run")
    before = losses(tmp_path / "run")
    ranks1.run(job, recipe(), tmp_path / "run", True)
    assert losses(tmp_path / "run") == before


@pytest.mark.parametrize(("pattern", "differs"), [("T-*T", True), ("M-*E", False)])
def test_every_validation_draws_random_experts_anew(
    ranks1: Ranks, recipe: Callable[..., Recipe], tmp_path: Path, pattern: str, differs: bool
) -> None:
    """The weights stay, so that only THOR's draws change the loss."""
    settings = (f"model.pattern={pattern}", "optimizer.lr=1e-30", "train.validate_every=2")
    ranks1.run(job, recipe(*settings), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(found) == 4
    assert len(set(found)) == (4 if differs else 1)


def test_validation_is_keyed_by_seed_and_step() -> None:
    keys = [validation_key(seed, step) for seed in range(5) for step in range(5)]
    assert len(set(keys)) == 25
    assert keys == [validation_key(seed, step) for seed in range(5) for step in range(5)]


def validation_of(rank: int, size: int, recipe: Recipe, run: Path) -> tuple[float, int]:
    """Returns the validation loss of the initial model, and the number of validation rows."""
    built = build(recipe, run, World(rank, size, torch.device("cpu")))
    rows = built.data.validation
    assert rows is not None
    assert rows.rows is not None
    loss, bits = validate_loss(built.engine, rows, recipe, None, 9)
    assert bits is None
    return loss, rows.rows


def test_validation_does_not_depend_on_ranks(
    ranks1: Ranks, ranks4: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Seven rows on four ranks in micro-batches of two: one rank runs out of rows."""
    for pattern in ("M-*E", "T-*E"):
        model = f"model.pattern={pattern}"
        expected = ranks1.run(validation_of, recipe(model), tmp_path)[0]
        assert expected[1] >= 7
        for layout in ((), ("parallel.tp=2",), ("parallel.cp=2",)):
            for result in ranks4.run(validation_of, recipe(model, *layout), tmp_path):
                assert result == pytest.approx(expected, rel=1e-12)


def test_order_is_a_function_of_seed_and_sample(recipe: Callable[..., Recipe]) -> None:
    first, second = (open_data(recipe()).train for _ in range(2))
    other = open_data(recipe("train.seed=1")).train
    assert torch.equal(first.batch([9, 4]).tokens[1], second.batch([4]).tokens[0])
    assert not torch.equal(first.batch(range(9)).tokens, other.batch(range(9)).tokens)
