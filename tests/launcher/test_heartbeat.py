"""heartbeat.json: replaced whole, seldom, in every phase; a full disk does not end the run."""

import errno
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.watch.heartbeat import Heartbeat
from colonnade.parallel.world import World


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "heartbeat.json").read_text())


def test_a_beat_says_who_is_where(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.beat(7, "save")
    row = read(tmp_path)
    assert abs(row.pop("time") - (tmp_path / "heartbeat.json").stat().st_mtime) < 60
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    assert row == {"step": 7, "attempt": 3, "phase": "save"} | process
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_beats_of_a_phase_are_seldom_and_a_new_phase_is_written_at_once(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 1, interval=3600)
    heartbeat.beat(1)
    heartbeat.beat(2)
    assert read(tmp_path)["step"] == 1
    heartbeat.beat(3, "validation")
    heartbeat.beat(3)
    assert (read(tmp_path)["step"], read(tmp_path)["phase"]) == (3, "train")
    often = Heartbeat(tmp_path, 1, interval=0)
    for step in (4, 5):
        often.beat(step)
        assert read(tmp_path)["step"] == step


def test_a_refused_beat_is_said_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heartbeat, run = Heartbeat(tmp_path / "run", 1, interval=0), tmp_path / "run"
    heartbeat.beat(1)
    heartbeat.beat(2)
    assert capsys.readouterr().err == (
        f"colonnade: {run}/heartbeat.json cannot be written (No such file or directory); the run "
        "goes on without\n"
    )
    run.mkdir()
    heartbeat.beat(3)
    heartbeat.beat(4)
    again = capsys.readouterr().err
    assert again == f"colonnade: {run}/heartbeat.json can be written again\n"
    assert read(run)["step"] == 4


def job(rank: int, size: int, recipe: Recipe, run: Path, full: bool) -> tuple[int | str, list[str]]:
    """Runs a job; returns its status or error, and the beats of this rank. `full`: the disk has no
    space for a heartbeat."""
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "recipe.toml").write_text(dump_recipe(recipe))
    beats: list[str] = []
    replace = os.replace

    def recorded(source: Path, target: Path) -> None:
        if Path(target).name == "heartbeat.json":
            row = json.loads(Path(source).read_text())
            beats.append(f"{row['phase']} {row['step']}")
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    os.replace = recorded  # type: ignore[assignment]
    try:
        return run_job(recipe, run, World(rank, size, torch.device("cpu"))), beats
    except UserError as error:
        return str(error), beats
    finally:
        os.replace = replace


@pytest.mark.parametrize("full", [False, True])
def test_the_phases_of_a_run(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path, full: bool
) -> None:
    fields = ("model.pattern=*-", "train.steps=2", "train.validate_every=1", "checkpoint.every=1")
    (status, beats), (_, others) = ranks2.run(job, recipe(*fields), tmp_path, full)
    assert status == 0
    assert others == []
    # of equal beats in a row within a second one is written
    expected = ["start 0", "train 1", "save 1", "train 1", "validation 1", "train 1"]
    expected += ["save 2", "train 2", "validation 2", "train 2", "stopped 2"]
    assert [beat for beat in beats if beat != "train 2" or beat in expected] == beats
    assert [beat for beat in beats if not beat.startswith("train")] == [
        beat for beat in expected if not beat.startswith("train")
    ]
    if not full:
        assert read(tmp_path)["phase"] == "stopped"


def test_a_run_that_fails_says_so(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """It ends because no loss is finite."""
    fields = ("model.pattern=*-", "optimizer.lr=1e30", "train.bad_steps=1", "optimizer.warmup=0")
    (status, beats), _ = ranks2.run(job, recipe(*fields), tmp_path, False)
    assert "not finite" in str(status)
    assert beats[-1].startswith("failed")
    assert read(tmp_path)["phase"] == "failed"
