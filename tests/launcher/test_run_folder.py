"""A run's folder is locked by one process, and keeps the recipe's fixed fields."""

import errno
import fcntl
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from colonnade.launcher.checkpoint import save, step_folder
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import DataConfig, OptimizerConfig, Recipe, TrainConfig
from colonnade.launcher.run_files import LOCK
from colonnade.launcher.train.folder import (
    CHECKPOINTS,
    COMING,
    RECIPE,
    open_existing,
    open_named,
    open_new,
    run_of,
)
from colonnade.launcher.train.lock import host_of, locked, show_life
from colonnade.launcher.train.resumable import check_resumable
from colonnade.models.config import ModelConfig

RESUMES = """
import sys
from pathlib import Path
from colonnade.launcher.errors import UserError
from colonnade.launcher.train.folder import open_existing
from colonnade.launcher.recipe.tables import Recipe
try:
    with open_existing(Recipe(), Path(sys.argv[1])):
        print("locked")
except UserError as mistake:
    print(mistake)
"""


def resume_in_other_process(folder: Path) -> str:
    command = [sys.executable, "-c", RESUMES, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_run_is_locked_against_other_processes(tmp_path: Path) -> None:
    """The lock belongs to the process: it ends with it, also when that is killed."""
    with open_new(Recipe(), tmp_path) as opened:
        folder = opened.path
        (message,) = resume_in_other_process(folder).splitlines()
        assert "trains this run" in message
        assert str(folder) in message
        assert not (folder / COMING).exists()
    with open_existing(Recipe(), folder), pytest.raises(UserError), open_existing(Recipe(), folder):
        pass
    assert (folder / LOCK).read_text() == ""
    assert resume_in_other_process(folder) == "locked\n"
    assert (folder / RECIPE).exists()


def test_paths_of_data_may_change_and_packing_may_not() -> None:
    """The checkpoint identifies the data by their content."""

    def recipe(**fields: str) -> Recipe:
        return Recipe(data=DataConfig(**fields))  # type: ignore[arg-type]

    check_resumable(recipe(tokenizer="a/tokenizer.json"), recipe(tokenizer="b/tokenizer.json"), 1)
    with pytest.raises(RecipeError, match=r"data\.packing = 'whole'"):
        check_resumable(recipe(), recipe(packing="whole"), 1)


def test_a_size_that_only_the_base_model_takes_over_may_not_change() -> None:
    """Under muP a derived size that is set to its own value becomes the base's as well."""

    def recipe(**fields: int) -> Recipe:
        return Recipe(model=ModelConfig(hidden=256, heads=4, mup_base={"hidden": 128}, **fields))

    check_resumable(recipe(), recipe(), 1)
    with pytest.raises(RecipeError, match=r"mup_base\.head_dim = 64: the run began with 32"):
        check_resumable(recipe(), recipe(head_dim=64), 1)


def test_only_what_changed_is_named() -> None:
    """Not sizes of sub-blocks that the model lacks, nor the sources that stayed."""

    def recipe(hidden: int, column: str, weight: float, precision: str = "fp32") -> Recipe:
        sources = [{"path": "a", "column": column}, {"path": "b", "weight": weight}]
        return Recipe(
            model=ModelConfig(pattern="*-", hidden=hidden),
            data=DataConfig(sources=sources),
            train=TrainConfig(precision=precision),
        )

    check_resumable(recipe(64, "text", 1.0), recipe(64, "other", 1.0, "bf16"), 1)
    with pytest.raises(RecipeError) as error:
        check_resumable(recipe(64, "text", 1.0), recipe(128, "text", 2.0, "fp64"), 1)
    fields = {fault.field for fault in error.value.faults}
    assert {"model.hidden", "train.precision", "data.sources.1.weight"} <= fields
    assert not [f for f in fields if "mamba" in f or "delta" in f or "s4d" in f]
    assert not [f for f in fields if f.startswith("data") and not f.endswith("weight")]


def test_the_kind_of_optimizer_stays() -> None:
    """Its numbers may change; the checkpoint does not hold the state of another optimizer."""
    fast, muon = OptimizerConfig(lr=0.5), OptimizerConfig(name="muon")
    check_resumable(Recipe(), Recipe(optimizer=fast), 1)
    with pytest.raises(RecipeError, match=r"optimizer\.name = 'muon': the run began with 'adamw'"):
        check_resumable(Recipe(), Recipe(optimizer=muon), 1)


def test_runs_of_one_second_have_different_folders(tmp_path: Path) -> None:
    with open_new(Recipe(), tmp_path) as one, open_new(Recipe(), tmp_path) as two:
        assert one.path != two.path


def of_other_host(folder: Path, age: float) -> Path:
    """A lock that a job of another host has not given back, and touched `age` seconds ago."""
    lock = folder / LOCK
    lock.write_text("process 7 on elsewhere (SLURM job 12)\n")
    os.utime(lock, (time.time() - age,) * 2)
    return lock


@contextmanager
def living_job_of_other_host(folder: Path) -> Iterator[None]:
    """Shows the signs of life of a job that has the lock."""
    lock, ended = of_other_host(folder, 0), threading.Event()
    pulse = threading.Thread(target=show_life, args=(lock, 0.05, ended))
    pulse.start()
    try:
        yield
    finally:
        ended.set()
        pulse.join()


def test_a_living_job_of_another_host_is_noticed(tmp_path: Path) -> None:
    """Its file system shares no locks with this host, but its signs of life are seen."""
    with (
        living_job_of_other_host(tmp_path),
        pytest.raises(UserError, match=r"process 7 on elsewhere \(SLURM job 12\) trains this"),
        locked(tmp_path, beat=0.2),
    ):
        pass


def test_hosts_whose_names_begin_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`node1` must look for the signs of life of `node10`."""
    assert host_of("process 7 on node10 (SLURM job 3)") == "node10"
    assert host_of("") is None
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewher")
    with (
        living_job_of_other_host(tmp_path),
        pytest.raises(UserError, match="on elsewhere"),
        locked(tmp_path, beat=0.2),
    ):
        pass


def test_a_beat_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats, utime = itertools.count(), os.utime

    def fail_once(path: Path) -> None:
        if next(beats) == 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        utime(path)

    monkeypatch.setattr(os, "utime", fail_once)
    with locked(tmp_path, beat=0.02):
        first = (tmp_path / LOCK).stat().st_mtime_ns
        end = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime_ns == first:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_of_two_that_start_together_without_locks_one_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the lock free; the one that wrote last has it."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(
        time, "sleep", lambda _: (tmp_path / LOCK).write_text("process 7 on elsewhere\n")
    )
    with pytest.raises(UserError, match="process 7 on elsewhere trains"), locked(tmp_path):
        pass


@pytest.mark.parametrize("age", [0, 3600])
def test_the_lock_of_a_dead_job_is_free(
    tmp_path: Path, age: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for signs of life only where the last one is not old."""
    of_other_host(tmp_path, age)
    waits, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (waits.append(seconds), sleep(seconds)))
    with locked(tmp_path, beat=0.1):
        assert bool(waits) == (age == 0)
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_holder_shows_life(tmp_path: Path) -> None:
    with locked(tmp_path, beat=0.02):
        first = (tmp_path / LOCK).stat().st_mtime_ns
        end = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime_ns == first:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_without_locks_signs_of_life_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        locked(tmp_path, beat=0.05),
        pytest.raises(UserError, match=f"process {os.getpid()} on"),
        locked(tmp_path, beat=0.1),
    ):
        pass
    assert "cannot be locked" in capsys.readouterr().err


def test_a_named_run_is_made_and_gone_on_with(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "runs" / "mine", Recipe()
    for _ in range(2):  # killed before its first checkpoint, it begins again
        with open_named(recipe, folder) as opened:
            assert opened[:2] == (folder, False)
            assert opened.recipe == folder / RECIPE
    save(step_folder(folder / CHECKPOINTS, 3), {}, {})
    faster = Recipe(optimizer=OptimizerConfig(lr=0.5))
    with open_named(faster, folder) as opened:
        assert opened[:2] == (folder, True)
        assert load_recipe(opened.recipe) == faster
        assert load_recipe(folder / RECIPE) == recipe
    other = Recipe(optimizer=OptimizerConfig(name="muon"))
    with pytest.raises(RecipeError, match=r"optimizer\.name"), open_named(other, folder):
        pass


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(UserError, match=r"no run \(recipe.toml is missing\) and holds thesis.tex"),
        open_named(Recipe(), tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_checkpoints_of_a_run_without_recipe_are_not_trained_over(tmp_path: Path) -> None:
    save(step_folder(tmp_path / CHECKPOINTS, 6), {}, {})
    with pytest.raises(UserError, match="holds step-00000006"), open_named(Recipe(), tmp_path):
        pass


def test_what_an_early_kill_leaves_is_no_hindrance(tmp_path: Path) -> None:
    for name in (LOCK, f"{LOCK}.node1.77", "save", "recipe.toml.new"):
        (tmp_path / name).touch()
    (tmp_path / CHECKPOINTS).mkdir()
    with open_named(Recipe(), tmp_path) as opened:
        assert opened.resume is False


def test_the_run_of_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = step_folder(tmp_path / CHECKPOINTS, 3)
    assert run_of(checkpoint) == (tmp_path, str(checkpoint))
    assert run_of(tmp_path) == (tmp_path, None)
    inside = tmp_path / CHECKPOINTS / "mine"  # a run in a folder of this name
    inside.mkdir(parents=True)
    (inside / RECIPE).touch()
    assert run_of(inside) == (inside, None)
    with pytest.raises(UserError, match="rename it to that"):
        run_of(tmp_path / CHECKPOINTS / "step-00000003.aside")
