"""Saves of a running job: in a thread and at once, when due, and what a run goes on from."""

import errno
import itertools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import RankError, Ranks
from test_checkpoint_damage import flip
from test_job import STATEFUL, after_each_update, job, losses

from colonnade.launcher import checkpoint
from colonnade.launcher.checkpoint import Saver, folders, newest, saver, step_folder
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.folder import ResumePoint
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.order import Order
from colonnade.parallel.world import World

MakeRecipe = Callable[..., Recipe]
Capture = pytest.CaptureFixture[str]


def steps(run: Path) -> list[int]:
    return [step for path in folders.checkpoints(run / "checkpoints")
            if (step := folders.step_of(path)) is not None]  # fmt: skip


@pytest.mark.parametrize("overrides", [(), STATEFUL, ("optimizer.name=muon", "parallel.tp=2")])
def test_a_thread_saves_the_same_bytes(
    ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Every step is saved while the next one runs, which changes buffers, weights and moments."""
    settings = (*overrides, "checkpoint.every=1", "checkpoint.keep=99", "train.steps=5")
    for asynchronous in ("true", "false"):
        chosen = recipe(*settings, f"checkpoint.asynchronous={asynchronous}")
        ranks2.run(job, chosen, tmp_path / asynchronous)
    for step in range(1, 6):
        one, other = (
            step_folder(tmp_path / name / "checkpoints", step) for name in ("true", "false")
        )
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in other.iterdir())
        assert len(names) > 3
        for name in set(names) - {"manifest.json"}:  # which has the time
            assert (one / name).read_bytes() == (other / name).read_bytes()
    assert losses(tmp_path / "true") == losses(tmp_path / "false")


def slow_copies(rank: int, size: int, recipe: Recipe, run: Path) -> list[bool]:
    """Runs a job whose copies begin only when the step after is about to update; returns for each
    update whether the copies were complete then."""
    copied: list[bool] = []
    begin, finish, wait = Saver.begin, saver.HostCopies.finish, Saver.wait
    about_to_update = threading.Event()

    def slow_begin(self: Saver, *arguments: object, **named: object) -> object:
        about_to_update.clear()
        return begin(self, *arguments, **named)  # type: ignore[arg-type]

    def slow_finish(self: saver.HostCopies) -> dict[str, torch.Tensor]:
        about_to_update.wait(5)
        return finish(self)

    def watched_wait(self: Saver) -> None:
        about_to_update.set()
        assert self.copying
        wait(self)
        copied.append(not self.copying)

    with (
        mock.patch.object(Saver, "begin", slow_begin),
        mock.patch.object(saver.HostCopies, "finish", slow_finish),
        mock.patch.object(Saver, "wait", watched_wait),
    ):
        job(rank, size, recipe, run)
    return copied


def test_updates_wait_for_copies(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    """However late the thread copies, it copies what the step left."""
    settings = (*STATEFUL, "checkpoint.every=1", "checkpoint.keep=99", "train.steps=4")
    results = ranks2.run(slow_copies, recipe(*settings), tmp_path / "slow")
    assert results == [[True] * 3] * 2
    ranks2.run(job, recipe(*settings, "checkpoint.asynchronous=false"), tmp_path / "plain")
    for step in range(1, 5):
        one, other = (step_folder(tmp_path / n / "checkpoints", step) for n in ("slow", "plain"))
        for path in one.glob("*.safetensors"):
            assert path.read_bytes() == (other / path.name).read_bytes()


def job_with_full_disk(rank: int, size: int, recipe: Recipe, run: Path) -> int:
    """Runs a job in which the disk of rank 1 is full when it writes its third checkpoint."""
    write, calls = saver.write_chunks, itertools.count(1)

    def refuse(folder: Path, chunks: dict[str, torch.Tensor]) -> dict[str, object]:
        if rank == 1 and next(calls) == 3:
            (folder / "half").write_bytes(bytes(100))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "half"))
        return write(folder, chunks)  # type: ignore[return-value]

    with mock.patch.object(saver, "write_chunks", refuse):
        return job(rank, size, recipe, run)


def test_a_disk_that_fills_in_the_middle_of_a_save(
    ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path
) -> None:
    """All ranks report it after the step in which it is known; the run goes on from the last."""
    settings = recipe("checkpoint.every=1", "checkpoint.keep=99")
    with pytest.raises(RankError) as failed:
        ranks2.run(job_with_full_disk, settings, tmp_path / "run")
    assert str(failed.value).count("UserError: could not save the checkpoint") == 2
    assert "step-00000003" in str(failed.value)
    assert steps(tmp_path / "run") == [1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    ranks2.run(job, settings, tmp_path / "run", True)
    ranks2.run(job, settings, tmp_path / "undisturbed")
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def test_which_checkpoints_stay(ranks1: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = ("checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=3")
    ranks1.run(job, recipe(*settings), tmp_path)
    assert steps(tmp_path) == [3, 6, 7, 8]


def test_saves_by_minutes(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    """A tiny interval is over after every step, a long one never."""
    for minutes, expected in (("1e-9", list(range(1, 9))), ("1000", [8])):
        run = tmp_path / minutes
        settings = recipe(f"checkpoint.minutes={minutes}", "checkpoint.keep=99")
        ranks2.run(job, settings, run)
        assert steps(run) == expected


def job_with_usr1(rank: int, size: int, recipe: Recipe, run: Path) -> int:
    """Runs a job whose last rank gets SIGUSR1 in its third step, and whose folder gets `save`
    in its fifth."""

    def ask(step: int) -> None:
        if step == 3 and rank == size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if step == 5 and rank == 0:
            (run / "save").touch()

    with after_each_update(ask):
        return job(rank, size, recipe, run)


def test_usr1_saves_and_goes_on_where_asked(
    ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = ("checkpoint.keep=99",)
    status = ranks2.run(job_with_usr1, recipe(*settings), tmp_path / "stops")
    assert status == [signal.SIGUSR1] * 2
    assert steps(tmp_path / "stops") == [3]
    saves = recipe(*settings, "checkpoint.usr1=save")
    assert ranks2.run(job_with_usr1, saves, tmp_path / "goes on") == [0, 0]
    assert steps(tmp_path / "goes on") == [3, 5, 8]
    assert not (tmp_path / "goes on" / "save").exists()


def resume_from(
    rank: int, size: int, recipe: Recipe, run: Path, source: ResumePoint, until: int | None = None
) -> int:
    world = World(rank, size, torch.device("cpu"))
    return run_job(recipe, run, world, True, Order(source, until))


def test_a_run_goes_back_to_an_earlier_checkpoint(
    ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Later checkpoints are set aside, so that a restart does not take them."""
    settings = recipe("checkpoint.every=2", "checkpoint.keep=99")
    ranks2.run(job, settings, tmp_path)
    expected = losses(tmp_path)
    source = ResumePoint(str(step_folder(tmp_path / "checkpoints", 4)))
    ranks2.run(resume_from, settings, tmp_path, source, 5)
    assert steps(tmp_path) == [2, 4, 5]
    aside = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.aside*"))
    assert aside == ["step-00000006.aside", "step-00000008.aside"]
    ranks2.run(job, settings, tmp_path, True)
    assert losses(tmp_path) == expected


def test_a_damaged_newest_checkpoint(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> None:
    """It is refused with what to type, and passed over where the choice is automatic."""
    settings = recipe("checkpoint.every=3", "checkpoint.keep=99")
    ranks2.run(job, settings, tmp_path)
    expected = losses(tmp_path)
    flip(step_folder(tmp_path / "checkpoints", 8) / "rank-00001.safetensors")
    with pytest.raises(RankError, match=r"--resume .*step-00000006, or --run DIR --resume auto"):
        ranks2.run(job, settings, tmp_path, True)
    assert steps(tmp_path) == [3, 6, 8]
    ranks2.run(resume_from, settings, tmp_path, ResumePoint(automatic=True))
    assert steps(tmp_path) == [3, 6, 8]
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.aside")] == [
        "step-00000008.aside"
    ]
    assert losses(tmp_path) == expected
    checkpoint.verify(newest(tmp_path / "checkpoints") or tmp_path)


def save_and_fail(one: Saver, folder: Path) -> None:
    """Trains until a failure, with a save in flight."""
    with one:
        one.begin(folder, {"w": torch.zeros(3)}, {})
        raise ArithmeticError("training failed")


def test_a_save_that_hangs_does_not_hold_a_failed_run(tmp_path: Path, capsys: Capture) -> None:
    """As when a host is lost: the thread waits for ranks that will never come."""
    forever = threading.Event()
    hangs = mock.patch.object(saver, "write_chunks", side_effect=lambda *_: forever.wait())
    with hangs, pytest.raises(ArithmeticError):
        save_and_fail(Saver(asynchronous=True, patience=0.2), step_folder(tmp_path, 1))
    forever.set()
    assert "step-00000001 was given up" in capsys.readouterr().err


def test_the_end_of_a_save_is_awaited_when_training_fails(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        save_and_fail(Saver(asynchronous=True, patience=60), step_folder(tmp_path, 1))
    checkpoint.verify(step_folder(tmp_path, 1))


def fail_to_copy(rank: int, size: int, folder: Path) -> str:
    """Saves, and rank 1 has no memory for its copies."""
    with Saver(asynchronous=True) as one:
        finish = saver.HostCopies.finish

        def fail(self: saver.HostCopies) -> dict[str, torch.Tensor]:
            if rank == 1:
                raise MemoryError("no memory")
            return finish(self)

        with mock.patch.object(saver.HostCopies, "finish", fail):
            one.begin(folder, {f"w{rank}": torch.zeros(3)}, {})
            one.wait()
            try:
                one.finish()
            except MemoryError as error:
                return str(error)
    return ""


def test_a_rank_that_cannot_copy_fails_on_all(ranks2: Ranks, tmp_path: Path) -> None:
    assert ranks2.run(fail_to_copy, step_folder(tmp_path, 1)) == ["no memory"] * 2
    assert newest(tmp_path) is None


def job_that_loses_its_folder(rank: int, size: int, recipe: Recipe, run: Path, how: str) -> int:
    """Runs a job in a locked folder, which somebody renames or replaces in its third step."""

    def lose(step: int) -> None:
        if step == 3 and rank == 0:
            run.rename(run.with_name("elsewhere"))
            if how == "replaced":
                (run / "checkpoints").mkdir(parents=True)
                (run / ".lock").touch()

    if rank == 0:
        run.mkdir()
        (run / ".lock").touch()
    with after_each_update(lose):
        return job(rank, size, recipe, run)


@pytest.mark.parametrize("how", ["renamed", "replaced"])
def test_a_run_whose_folder_is_lost_ends(
    ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path, how: str
) -> None:
    """It must not write into a folder that is not its own, which another job may have locked."""
    settings = recipe("checkpoint.every=2", "checkpoint.keep=9")
    with pytest.raises(RankError) as failed:
        ranks2.run(job_that_loses_its_folder, settings, tmp_path / "run", how)
    message = "UserError: " + str(tmp_path / "run") + ": the run's folder was removed, renamed"
    assert str(failed.value).count(message) == 2
    assert steps(tmp_path / "elsewhere") == [2]
    assert steps(tmp_path / "run") == []
    rows = read_metrics(tmp_path / "elsewhere" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_folder_called_save_is_left_alone(
    ranks1: Ranks, recipe: MakeRecipe, tmp_path: Path
) -> None:
    (tmp_path / "save").mkdir()
    ranks1.run(job, recipe("train.steps=2"), tmp_path)
    assert steps(tmp_path) == [2]


def test_a_bad_state_leaves_the_saver_usable(tmp_path: Path) -> None:
    with Saver(asynchronous=True) as one:
        with pytest.raises(ValueError, match="not JSON compliant"):
            one.begin(step_folder(tmp_path, 1), {}, {"loss": float("nan")})
        weights = torch.arange(3.0)
        one.begin(step_folder(tmp_path, 1), {"w": weights}, {})
        one.wait()
        weights.zero_()
    checkpoint.load(step_folder(tmp_path, 1), {"w": weights})
    assert weights.tolist() == [0, 1, 2]


def test_a_failure_is_kept_until_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = Saver(asynchronous=True)
    save = one.begin(step_folder(tmp_path / "file", 1), {"w": torch.zeros(3)}, {})
    one.wait()
    assert save.thread is not None
    save.thread.join()
    assert one.failed
    with pytest.raises(UserError, match="could not save the checkpoint"):
        one.finish()
    assert not one.failed
