"""Checkpoint folders of a run: their names, which are complete, and the atomic commit of one."""

import itertools
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import cast

from colonnade.launcher.errors import UserError
from colonnade.launcher.run_files import CHECKPOINTS

STATE = "state.json"
TENSORS = "tensors.json"
MANIFEST = "manifest.json"
# While a step is saved a second time, its older copy is named `.replaced` between two renames.
_COMPLETE = re.compile(r"step-(\d+)(\.replaced)?")
_PARTIAL = re.compile(r"step-\d+\.partial")


def step_folder(run: Path, step: int) -> Path:
    """Returns the path of the checkpoint of `step` in `run`, the folder of a run's checkpoints."""
    return run / f"step-{step:08d}"


def partial(folder: Path) -> Path:
    """Returns the path at which the checkpoint `folder` is written until it is committed."""
    return folder.with_name(folder.name + ".partial")


def replaced(folder: Path) -> Path:
    """Returns the path of the older checkpoint of the same step while `folder` is committed."""
    return folder.with_name(folder.name + ".replaced")


def is_checkpoint(folder: Path) -> bool:
    """Returns whether `folder` is a checkpoint, whole or damaged since.

    A folder gets its name only once all of its files are on the disk, so any file makes it one: a
    checkpoint that lost files must be reported, not passed over.
    """
    try:
        return any(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # also where it is deleted in this moment
        return False


def checkpoints(run: Path) -> list[Path]:
    """Lists the checkpoints in `run`, lowest step first; none if `run` is absent."""
    by_step: dict[int, Path] = {}
    for path in sorted(run.iterdir()) if run.is_dir() else []:  # step-N before step-N.replaced
        if (step := step_of(path)) is not None and is_checkpoint(path):
            by_step.setdefault(step, path)
    return [by_step[step] for step in sorted(by_step)]


def newest(run: Path) -> Path | None:
    """Returns the checkpoint of the highest step in `run`; None if there is none."""
    return next(reversed(checkpoints(run)), None)


def checkpoint_of(path: Path) -> Path | None:
    """Returns a path that is named as a checkpoint, or the newest checkpoint of a run's folder;
    None if that has none."""
    return path if step_of(path) is not None else newest(path / CHECKPOINTS)


def newest_before(folder: Path) -> Path | None:
    """Returns the run's newest checkpoint of an earlier step than `folder`."""
    step = step_of(folder)
    for path in reversed(checkpoints(folder.parent)):
        if step is None or cast(int, step_of(path)) < step:
            return path
    return None


def set_aside(folder: Path) -> Path:
    """Renames a checkpoint to `….aside`, where nothing looks for it; returns its new path.

    It is one that is damaged, or that a run which went back to an earlier step made in vain.
    """
    finish_replacement(folder)  # an older copy would take its place
    names = (f"{folder.name}.aside{number or ''}" for number in itertools.count())
    target = next(path for name in names if not (path := folder.with_name(name)).exists())
    return folder.rename(target)


def prune(run: Path, keep: int, keep_every: int = 0, stay: Collection[int] = ()) -> None:
    """Deletes old checkpoints in `run`; only rank 0 calls it.

    Renames each to `….pruned` before deleting it, so that no partly deleted checkpoint looks
    damaged, and first deletes the `….pruned` folders of an interrupted call. Raises OSError where
    the disk refuses.

    Args:
        run: the folder of a run's checkpoints.
        keep: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay as well; 0: none.
        stay: steps whose checkpoints stay in any case.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: the newest checkpoint is never deleted")
    for interrupted in run.glob("step-*.pruned"):
        shutil.rmtree(interrupted)
    for old in checkpoints(run)[:-keep]:
        step = cast(int, step_of(old))
        if step in stay or (keep_every and step % keep_every == 0):
            continue
        shutil.rmtree(old.rename(old.with_name(old.name + ".pruned")))


def prepare(folder: Path) -> None:
    """Makes the empty `folder.partial`, after it has cleaned up after a crashed save."""
    run = folder.parent
    run.mkdir(exist_ok=True)  # not its parents: a run whose folder was removed must not come back
    finish_replacement(folder)
    if folder.exists() and not is_checkpoint(folder):
        raise UserError(f"{folder} exists and is not a checkpoint: move it away, then save again")
    for path in run.iterdir():
        if path == partial(folder) or _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    partial(folder).mkdir()


def commit(folder: Path) -> None:
    """Renames the complete `folder.partial` to `folder`; an older `folder` becomes `.replaced`."""
    # The files are on disk already. The folder's entries must be before it gets its name, and the
    # rename itself before the save returns.
    fsync(partial(folder))
    if folder.exists():
        folder.rename(replaced(folder))
    partial(folder).rename(folder)
    fsync(folder.parent)


def finish_replacement(folder: Path) -> None:
    """Deletes the `.replaced` copy if the new `folder` is complete; else gives it its name back."""
    if not replaced(folder).exists():
        return
    if is_checkpoint(folder):
        shutil.rmtree(replaced(folder))
    else:
        replaced(folder).rename(folder)


def write_durably(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path` and waits until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    fsync(path)


def fsync(path: Path) -> None:
    """Waits until the file or folder `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_of(folder: Path) -> int | None:
    """Returns the step in a checkpoint folder's name; None for other names."""
    match = _COMPLETE.fullmatch(folder.name)
    return int(match[1]) if match else None


def missing_error(folder: Path) -> UserError:
    """Returns the error for a checkpoint that does not exist, or has lost its manifest."""
    if is_checkpoint(folder):
        return damaged_error(folder / MANIFEST, "it is missing")
    problem = "is empty" if folder.exists() else "does not exist"
    earlier = newest_before(folder)
    remedy = f"the newest earlier one is {earlier}" if earlier else "there is none before it"
    return UserError(f"checkpoint {folder} {problem}: {remedy}")


class DamagedError(UserError):
    """A checkpoint lacks a file, or has one that is not what was written."""


def unreadable_error(path: Path, error: OSError) -> UserError:
    """Returns the error for a file that cannot be read now, which says nothing of its content."""
    return UserError(f"{path} cannot be read ({error.strerror}): make it readable, then try again")


def damaged_error(path: Path, reason: str) -> DamagedError:
    """Returns the error for the file `path` of a checkpoint that is unreadable or altered."""
    earlier = newest_before(path.parent)
    remedy = (
        f"go on from an earlier checkpoint: --resume {earlier}, or --run DIR --resume auto"
        if earlier
        else "there is no earlier checkpoint beside it; restore the file from a copy, or start anew"
    )
    return DamagedError(f"{path} is damaged ({reason}): {remedy}")
