"""Spikes of the loss: what is one, how a run goes back, and what it trains on afterwards."""

import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import RankError, Ranks
from test_job import job, losses
from tiny import MakeRecipe, tiny_recipe

from colonnade.launcher.checkpoint import read_state, step_folder
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import GuardConfig, Recipe
from colonnade.launcher.train import loop
from colonnade.launcher.train.events import goodput, read_events
from colonnade.launcher.train.guard.spikes import SpikeGuard
from colonnade.launcher.train.job import build
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.schedule import micro_batches
from colonnade.launcher.train.step import Result, train_step
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.world import World

GUARD = (
    "guard.spike=1000", "guard.window=3", "checkpoint.every=2", "checkpoint.keep=99",
)  # fmt: skip
STATEFUL = (  # state beside parameters, and keys of random draws
    "model.pattern=ET-", "model.experts=3", "model.router_bias=true", "model.router_bias_rate=0.1",
    "model.router_noise=0.5", "model.sigma_reparam=true",
)  # fmt: skip
HIGH, NAN = 1000.0, math.nan


# What is a spike


@pytest.fixture
def recipe(tokens: Path, tmp_path: Path) -> MakeRecipe:
    """A tiny recipe with overrides."""
    fields = ("data.validation=0.2", "train.steps=10", "train.global_batch=8",
              "train.precision=fp64", "train.validate_rows=4")  # fmt: skip
    return tiny_recipe(tmp_path, tokens, *fields)


def spikes_of(config: GuardConfig, found: list[float]) -> list[int]:
    """The steps of these losses, from 1, that are spikes."""
    guard = SpikeGuard()
    observed = (guard.observe(config, n, loss, 1.0) for n, loss in enumerate(found, start=1))
    return [spike.step for spike in observed if spike]


def falling(count: int) -> list[float]:
    """Losses of a run: they fall, with noise."""
    noise = random.Random(5)
    return [3 + 8 * math.exp(-n / 50) + noise.gauss(0, 0.05) for n in range(count)]


def test_a_falling_loss_has_no_spikes() -> None:
    assert not spikes_of(GuardConfig(spike=6.0), falling(2000))


def test_high_losses_are_spikes_and_do_not_hide_others() -> None:
    """Nor do they enter the window."""
    found = falling(1000)
    for step in (500, 501, 502, 600):
        found[step - 1] += 1.0
    found[699] -= 1.0
    assert spikes_of(GuardConfig(spike=6.0), found) == [500, 501, 502, 600]


def test_until_the_window_is_full_only_what_is_not_finite_is_a_spike() -> None:
    config = GuardConfig(spike=6.0, window=4)
    assert spikes_of(config, [1.0, 1.1, 99.0, math.inf, 1.0, math.nan, 1e9]) == [4, 6, 7]
    guard = SpikeGuard()
    assert guard.observe(config, 1, 1.0, math.inf)
    assert not SpikeGuard().observe(GuardConfig(), 1, math.nan, 1.0)  # off


def test_the_limit_counts_spikes_within_the_window() -> None:
    config, guard = GuardConfig(spike=6.0, window=10, limit=2, skip=3), SpikeGuard()
    assert list(guard.skip(config, spike(2))) == [1, 2]
    assert list(guard.skip(config, spike(30))) == [28, 29, 30]
    assert list(guard.skip(config, spike(31))) == [29, 30, 31]
    assert sorted(guard.skipped) == [1, 2, 28, 29, 30, 31]
    with pytest.raises(UserError, match=r"step 40: .* after 2 others .*\(30, 31\).*limit = 2"):
        guard.skip(config, spike(40))
    assert guard.skip(config, spike(42))
    assert SpikeGuard.of(guard.state()) == guard


def spike(step: int) -> Any:
    found = SpikeGuard().observe(GuardConfig(spike=6.0), step, math.nan, 1.0)
    assert found
    return found


# Runs


def job_with_spikes(
    rank: int,
    size: int,
    recipe: Recipe,
    run: Path,
    bad: dict[int, float],
    resume: bool = False,
    until: int | None = None,
    kill_at: int = 0,
    stop_at: int = 0,
) -> list[int]:
    """Runs a job in which these steps, from 1, have these losses, and update with their gradients;
    returns the steps that were trained. At the second begin of step `kill_at` it raises, and in
    step `stop_at` rank 0 gets SIGTERM."""
    trained: list[int] = []

    def with_spike(*arguments: Any) -> Result:
        step = arguments[4] + 1
        trained.append(step)
        if trained.count(kill_at) == 2:
            raise ArithmeticError("killed")
        if step == stop_at and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        result = train_step(*arguments)
        loss = bad.get(step, result.report.loss)
        return result._replace(report=replace(result.report, loss=loss))

    with mock.patch.object(loop, "train_step", with_spike):
        if kill_at:
            with pytest.raises(ArithmeticError):
                job(rank, size, recipe, run, resume, until)
        else:
            job(rank, size, recipe, run, resume, until)
    return trained


def losses_without(
    rank: int, size: int, recipe: Recipe, folder: Path, left_out: set[int]
) -> list[float]:
    """Trains on all steps but some, with no run around it; returns the losses."""
    one = build(recipe, folder, World(rank, size, torch.device("cpu")))
    found = []
    for step in range(recipe.train.steps):
        if step + 1 not in left_out:
            samples = micro_batches(one.stage, step, *data_rank(one.mesh))
            batches = [one.data.train.batch(rows) for rows in samples]
            found.append(train_step(one.engine, batches, samples, one.stage, step).report.loss)
    return found


def training_losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    ("overrides", "loss"), [((), HIGH), ((*STATEFUL, "train.validate_every=3"), NAN)]
)
def test_a_run_goes_on_as_if_it_had_never_seen_the_batch(
    ranks1: Ranks, ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path, overrides: Any, loss: float
) -> None:
    settings = recipe(*GUARD, *overrides)
    for ranks in (ranks1, ranks2):
        run = tmp_path / str(ranks.size)
        trained = ranks.run(job_with_spikes, settings, run, {7: loss})
        assert trained == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]] * ranks.size
        expected = ranks.run(losses_without, settings, tmp_path, {7})[0]
        assert training_losses(run) == expected
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "validation_loss" not in row]
        assert [row["step"] for row in rows] == list(range(1, 11))
        assert [row["step"] for row in rows if row.get("passed_over")] == [7]
        (event,) = [e for e in read_events(run) if e["event"] == "rewind"]
        wanted = {"step": 6, "spike": 7, "skipped": [7], "samples": [48, 55]}
        assert event.items() >= wanted.items()
        assert event["loss"] == (loss if loss == HIGH else None)


def test_several_steps_are_passed_over(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    """The checkpoint of step 6 is within them, so that the run goes back to that of step 4, and
    sets the other aside; two spikes follow each other."""
    settings, run = recipe(*GUARD, "guard.skip=2"), tmp_path / "run"
    trained = ranks2.run(job_with_spikes, settings, run, {7: HIGH, 9: HIGH})[0]
    assert trained == [1, 2, 3, 4, 5, 6, 7, 5, 8, 9, 10]
    expected = ranks2.run(losses_without, settings, tmp_path, {6, 7, 8, 9})[0]
    assert training_losses(run) == expected
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"step-00000004", "step-00000006.aside", "step-00000010"} <= names
    state = read_state(step_folder(run / "checkpoints", 10))["guard"]
    assert (state["skipped"], state["spikes"]) == ([6, 7, 8, 9], [7, 9])
    spent = goodput(read_events(run), read_metrics(run / "metrics.jsonl", superseded=True))
    assert spent is not None
    rows = read_metrics(run / "metrics.jsonl", superseded=True)
    seconds = [(row["step"], row["seconds"]) for row in rows if "seconds" in row]
    seconds.pop(7)  # the second step 5
    assert spent.lost == pytest.approx(sum(s for step, s in seconds if step in range(5, 10)))


def test_a_resumed_run_passes_over_the_same_steps(
    ranks1: Ranks, ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path
) -> None:
    """It was killed after the rewind, before it saved a later checkpoint, and does not see the
    spike again; or it goes on on other ranks, without the guard."""
    settings = recipe(*GUARD, "checkpoint.every=4")
    ranks2.run(job_with_spikes, settings, tmp_path / "whole", {7: HIGH})
    run = tmp_path / "killed"
    trained = ranks2.run(job_with_spikes, settings, run, {7: HIGH}, False, None, 6)[0]
    assert trained == [1, 2, 3, 4, 5, 6, 7, 5, 6]
    assert ranks2.run(job_with_spikes, settings, run, {}, True)[0] == [5, 6, 8, 9, 10]
    assert losses(run) == losses(tmp_path / "whole")
    other = tmp_path / "other"
    ranks2.run(job_with_spikes, settings, other, {7: HIGH}, False, None, 6)
    ranks1.run(job, recipe("checkpoint.every=4"), other, True)
    assert losses(other) == pytest.approx(losses(run), rel=1e-10)


def test_a_signal_in_the_step_of_a_spike(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    """The run stops after the rewind, whose checkpoint knows of the spike."""
    settings, run = recipe(*GUARD), tmp_path / "run"
    trained = ranks2.run(job_with_spikes, settings, run, {7: HIGH}, False, None, 0, 7)[0]
    assert trained == [1, 2, 3, 4, 5, 6, 7]
    assert ranks2.run(job_with_spikes, settings, run, {}, True)[0] == [8, 9, 10]
    assert training_losses(run) == ranks2.run(losses_without, settings, tmp_path, {7})[0]
    assert [e["reason"] for e in read_events(run) if "reason" in e] == ["SIGTERM", "finished"]


def test_a_stream_is_read_again(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    words = random.Random(2).choices(["one", "two", "three", "four"], k=4000)
    text = "\n\n".join(" ".join(words[i : i + 40]) for i in range(0, 4000, 40))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    stream = (f"data.sources.0.path={tmp_path / 'text.txt'}", "data.sources.0.stream=true",
              "data.sources.0.format=text", "model.vocab=257", "data.validation=",
              "train.validate_rows=", "checkpoint.every=3")  # fmt: skip
    settings, run = recipe(*GUARD, *stream), tmp_path / "run"
    trained = ranks2.run(job_with_spikes, settings, run, {8: HIGH})[0]
    assert trained == [1, 2, 3, 4, 5, 6, 7, 8, 7, 9, 10]
    assert training_losses(run) == ranks2.run(losses_without, settings, tmp_path, {8})[0]


def test_without_a_spike_nothing_changes(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    ranks2.run(job, recipe(*GUARD), tmp_path / "on")
    off = [setting for setting in GUARD if not setting.startswith("guard")]
    ranks2.run(job, recipe(*off), tmp_path / "off")
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    saved = [read_state(step_folder(tmp_path / n / "checkpoints", 10)) for n in ("on", "off")]
    assert saved[0].pop("guard") == {"losses": training_losses(tmp_path / "on")[-3:]}
    assert saved[0] == saved[1]


def test_a_spike_before_the_first_checkpoint_ends_the_run(
    ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(RankError) as failed:
        ranks2.run(job_with_spikes, recipe(*GUARD), tmp_path / "run", {2: NAN})
    told = (
        "step 2: loss nan, gradient norm .*: not finite, and there is no checkpoint before step 2"
    )
    failed.match(told)
    assert [e["reason"] for e in read_events(tmp_path / "run") if "reason" in e] == ["error"]


def test_spikes_without_end_end_the_run(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = recipe(*GUARD, "guard.limit=2", "train.steps=20")
    with pytest.raises(RankError, match=r"step 9: .* after 2 others within guard\.window = 3"):
        ranks2.run(job_with_spikes, settings, tmp_path / "run", dict.fromkeys(range(7, 20), NAN))
    rewinds = [e["spike"] for e in read_events(tmp_path / "run") if e["event"] == "rewind"]
    assert rewinds == [7, 8]


def test_stages_and_the_last_step(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    """The run goes back into the stage before; the last step is passed over and saved."""
    stages = ("stage.0.steps=5", "stage.1.steps=4", "stage.1.parallel.tp=2", "guard.skip=2")
    settings, run = recipe(*GUARD, *stages, "train.steps="), tmp_path / "run"
    trained = ranks2.run(job_with_spikes, settings, run, {6: HIGH, 9: HIGH})[0]
    assert trained == [1, 2, 3, 4, 5, 6, 7, 8, 9, 7]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("passed_over")] == [5, 6, 8, 9]
    assert read_state(step_folder(run / "checkpoints", 9))["step"] == 9
    assert [e["reason"] for e in read_events(run) if "reason" in e] == ["finished"]
