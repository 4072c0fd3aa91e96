"""Checkpoints under failures: full disks and dead ranks leave the last good one intact."""

import errno
import functools
import itertools
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import RankError, Ranks
from test_checkpoint import (
    STATE,
    check_in_one_process,
    different,
    values,
)

from colonnade.launcher import checkpoint
from colonnade.launcher.checkpoint import newest, read_state, saver, step_folder, write
from colonnade.launcher.errors import UserError

MiB = 1 << 20


def save_limited(rank: int, size: int, run: Path, limited: int) -> str:
    """Saves step 1, then step 2 with files of at most 64 KiB on the rank `limited`."""
    tensors = {f"w{rank}": torch.ones(MiB // 4)}
    checkpoint.save(step_folder(run, 1), tensors, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        checkpoint.save(step_folder(run, 2), tensors, {"step": 2})
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return ""


@pytest.mark.parametrize("limited", [0, 1])
def test_a_full_disk_is_reported_on_every_rank(tmp_path: Path, ranks2: Ranks, limited: int) -> None:
    # A limit on the size of files fails real writes on every machine, without root.
    first, second = ranks2.run(save_limited, tmp_path, limited)
    assert first == second
    for phrase in (
        step_folder(tmp_path, 2),
        f"rank-{limited:05d}",
        "needs more than 2.0 MiB",
        "free there",
    ):
        assert str(phrase) in first
    assert f"{step_folder(tmp_path, 1)}, is intact" in first
    assert [path.name for path in tmp_path.iterdir()] == [step_folder(tmp_path, 1).name]
    assert read_state(newest(tmp_path) or tmp_path) == {"step": 1}
    assert ranks2.run(save_limited, tmp_path, -1) == ["", ""]
    assert newest(tmp_path) == step_folder(tmp_path, 2)


@pytest.mark.parametrize("step", [1, 2])
def test_a_disk_that_fills_at_the_commit(tmp_path: Path, step: int) -> None:
    """The failed save is of step 1 for the second time, or of a later step."""
    checkpoint.save(step_folder(tmp_path, 1), values(1), STATE)
    rename = Path.rename

    def rename_on_full_disk(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return rename(path, target)

    with (
        mock.patch.object(Path, "rename", rename_on_full_disk),
        pytest.raises(UserError, match=r"No space left.*is intact.*Free space"),
    ):
        checkpoint.save(step_folder(tmp_path, step), values(2), {})
    assert [path.name for path in tmp_path.iterdir()] == [step_folder(tmp_path, 1).name]
    check_in_one_process(step_folder(tmp_path, 1))


def test_a_disk_that_refuses_the_cleaning_as_well(tmp_path: Path) -> None:
    """As where a file system turns read-only: one sentence, and the next save cleans up."""
    checkpoint.save(step_folder(tmp_path, 1), values(1), STATE)
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")
    with (
        mock.patch.object(saver, "write_chunks", side_effect=refused),
        mock.patch("shutil.rmtree", side_effect=refused),
        pytest.raises(UserError, match=r"Read-only.*step-00000001, is intact"),
    ):
        checkpoint.save(step_folder(tmp_path, 2), values(2), {})
    (tmp_path / "step-00000009.partial").write_text("a file of this name")
    checkpoint.save(step_folder(tmp_path, 2), values(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_an_unusable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not save the checkpoint .*none before it"):
        checkpoint.save(step_folder(tmp_path / "file", 1), values(1), {})
    step_folder(tmp_path, 1).mkdir()
    with pytest.raises(UserError, match="not a checkpoint: move it away"):
        checkpoint.save(step_folder(tmp_path, 1), values(1), {})


def die_while_writing(rank: int, size: int, run: Path) -> None:
    checkpoint.save(step_folder(run, 10), values(1), STATE)
    if rank == 1:
        with mock.patch.object(write, "save_file", side_effect=lambda *_: os._exit(9)):
            checkpoint.save(step_folder(run, 20), values(2) | {"rank1": torch.ones(3)}, {})
    checkpoint.save(step_folder(run, 20), values(2), {})


def test_a_rank_that_dies_while_saving(tmp_path: Path, ranks2: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1: died, exit code 9"):
        ranks2.run(die_while_writing, tmp_path)
    assert (tmp_path / "step-00000020.partial").is_dir()
    assert newest(tmp_path) == step_folder(tmp_path, 10)
    check_in_one_process(step_folder(tmp_path, 10))
    checkpoint.save(step_folder(tmp_path, 30), values(1), STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


def crash_at(action: Callable[[], None], index: int) -> bool:
    """Runs `action` in a child process that dies before its `index`-th change to the disk.

    Returns whether the child died; it does not if `action` makes fewer changes.
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 77)
        return status == 77
    changes = 0

    def die_or_call(change: Callable[..., object], *args: object, **kwargs: object) -> object:
        nonlocal changes
        changes += 1
        return os._exit(77) if changes == index else change(*args, **kwargs)

    for name in ("fsync", "mkdir", "rename", "rmdir", "unlink"):
        setattr(os, name, functools.partial(die_or_call, getattr(os, name)))
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("step", [10, 20])
def test_crash_at_any_change_to_the_disk(tmp_path: Path, step: int) -> None:
    """A complete checkpoint remains, whether the save is of step 10 again or of a later step."""
    for index in itertools.count(1):
        checkpoint.save(step_folder(tmp_path, 10), values(1), {"seed": 1})
        crashed = crash_at(
            lambda: checkpoint.save(step_folder(tmp_path, step), values(2), {"seed": 2}), index
        )
        folder, loaded = newest(tmp_path), values(3)
        assert folder is not None
        seed = checkpoint.load(folder, loaded)["seed"]
        assert different(loaded, values(seed)) == []
        if not crashed:
            break
        if folder == step_folder(tmp_path, 20):
            shutil.rmtree(folder)
    assert seed == 2
    assert index > 8
    assert [path.name for path in tmp_path.glob("*.*")] == []


def test_every_file_is_synced_before_the_commit(tmp_path: Path) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append("commit")
        rename(source, target)

    folder = step_folder(tmp_path, 1)
    with mock.patch("os.fsync", record_fsync), mock.patch("os.rename", record_rename):
        checkpoint.save(folder, values(1), STATE)
    commit = events.index("commit")
    files = {path.name for path in folder.iterdir()}
    assert set(events[:commit]) == files | {f"{folder.name}.partial"}
    assert events[commit + 1 :] == [tmp_path.name]
