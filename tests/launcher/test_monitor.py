"""Reports to TensorBoard and Weights & Biases: a resumed run continues the same curves."""

import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.launcher.train.metrics import current_rows, read_metrics
from colonnade.launcher.train.monitor import Monitor
from colonnade.parallel.world import World

WORLD = World(0, 1, torch.device("cpu"))


def report(run: Path, recipe: Recipe, start: int, end: int, loss: float, attempt: int = 1) -> None:
    """Reports the steps after `start` up to `end`, as a run that stops there, or is interrupted."""
    monitor = Monitor(run, recipe, training_stages(recipe)[0], start, attempt)
    for step in range(start + 1, end + 1):
        metrics = {"step": step, "loss": loss + step, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5}
        monitor.step(metrics, 10, WORLD)
    monitor.close()


def test_loads_are_curves_of_the_largest_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only metrics.jsonl has the lists; a value that is not finite is null there."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = Recipe(train=TrainConfig(tensorboard=True, wandb=True))
    monitor = Monitor(tmp_path, recipe, training_stages(recipe)[0], 0, 3)
    loads = {"loads": {"3": [1, 3]}, "largest_share": {"3": 0.75}}
    monitor.record({"step": 1, "loss": float("nan"), "lr": 0.5, **loads})
    monitor.close()
    (row,) = read_metrics(monitor.path)
    assert row.pop("time") == pytest.approx(time.time(), abs=60)
    assert row == {"step": 1, "loss": None, "lr": 0.5, "attempt": 3, **loads}
    assert wandb.logged == [{"step": 1, "lr": 0.5, "largest_share/3": 0.75}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"lr", "largest_share/3"}


def test_repeated_steps_supersede_earlier_rows_and_delete_none(tmp_path: Path) -> None:
    recipe = Recipe(train=TrainConfig(steps=9))
    report(tmp_path, recipe, 0, 8, loss=0.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # torn by a crash
    report(tmp_path, recipe, 5, 9, loss=100.0, attempt=2)
    rows = read_metrics(tmp_path / "metrics.jsonl", superseded=True)
    assert [row["step"] for row in rows] == [*range(1, 9), *range(6, 10)]
    current = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert current == {s: s + (100.0 if s > 5 else 0.0) for s in range(1, 10)}
    assert rows[0]["tokens_per_s"] == 20.0
    assert rows[0]["memory_gib"] > 0


def row(step: int, attempt: int | None, validation: bool = False) -> dict[str, Any]:
    """A row of metrics, of an older version without `attempt`."""
    loss = {"validation_loss": 1.0} if validation else {"loss": 1.0}
    return {"step": step, **loss} | ({} if attempt is None else {"attempt": attempt})


@pytest.mark.parametrize(
    ("rows", "current"),
    [
        ([row(1, None), row(2, None), row(2, None, True)], [0, 1, 2]),
        # a file begun by an older version, and gone on with after step 1
        ([row(1, None), row(2, None), row(2, 2)], [0, 2]),
        # validations before the checkpoint's step and at it stay; one after it goes
        ([row(1, 1), row(1, 1, True), row(2, 1), row(2, 1, True), row(2, 2)], [0, 1, 4]),
        # a finished run is resumed: only its last validation is repeated
        ([row(1, 1), row(2, 1), row(2, 1, True), row(2, 2, True)], [0, 1, 3]),
        # the third attempt starts before the second, whose rows all go
        ([row(1, 1), row(2, 1), row(3, 1), row(3, 2), row(4, 2), row(2, 3)], [0, 5]),
        # the third starts after the second, which goes on in part
        ([row(1, 1), row(2, 1), row(2, 2), row(3, 2), row(4, 2), row(4, 3)], [0, 2, 3, 5]),
        # fewer steps than before
        ([row(1, 1), row(2, 1), row(3, 1), row(1, 2)], [3]),
    ],
)  # fmt: skip
def test_which_rows_count(rows: list[dict[str, Any]], current: list[int]) -> None:
    assert current_rows(rows) == [rows[n] for n in current]


def test_tensorboard_shows_one_curve(tmp_path: Path) -> None:
    """Steps past the checkpoint of an interrupted run are those of the resumed run."""
    recipe = Recipe(train=TrainConfig(steps=9, tensorboard=True))
    report(tmp_path, recipe, 0, 8, loss=0.0)
    report(tmp_path, recipe, 5, 9, loss=100.0, attempt=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == {s: s + (100.0 if s > 5 else 0.0) for s in range(1, 10)}
    assert len(events.Scalars("loss")) == 9


class Wandb(types.ModuleType):
    """Replaces the library, which needs an account; records its calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []

    def init(self, **settings: Any) -> "Wandb":
        self.runs.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, numbers: dict[str, Any]) -> None:
        self.logged.append(numbers)

    def finish(self) -> None:
        pass


def test_wandb_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = Recipe(train=TrainConfig(steps=9, wandb=True))
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    report(other, recipe, 0, 0, 0.0)
    report(run, recipe, 0, 8, 0.0)
    report(run.rename(tmp_path / "moved"), recipe, 5, 9, 100.0, 2)
    different, first, resumed = wandb.runs
    assert first["id"] == resumed["id"] != different["id"]
    assert resumed["resume"] == "allow"
    assert [row["step"] for row in wandb.logged] == [*range(1, 9), *range(6, 10)]
