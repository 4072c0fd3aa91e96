"""Checkpoint folders of a run: their names, which are complete, and the atomic commit of one."""

import os
import re
import shutil
from pathlib import Path
from typing import cast

from colonnade.launcher.errors import UserError

STATE = "state.json"
TENSORS = "tensors.json"
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


def is_complete(folder: Path) -> bool:
    """Returns whether `folder` is a checkpoint; it is renamed to this only once all is on disk."""
    return (folder / STATE).is_file() and (folder / TENSORS).is_file()


def checkpoints(run: Path) -> list[Path]:
    """Lists the complete checkpoints in `run`, lowest step first; none if `run` is absent."""
    by_step: dict[int, Path] = {}
    for path in sorted(run.iterdir()) if run.is_dir() else []:  # step-N before step-N.replaced
        if (step := _step(path)) is not None and is_complete(path):
            by_step.setdefault(step, path)
    return [by_step[step] for step in sorted(by_step)]


def newest(run: Path) -> Path | None:
    """Returns the complete checkpoint of the highest step in `run`; None if there is none."""
    return next(reversed(checkpoints(run)), None)


def newest_before(folder: Path) -> Path | None:
    """Returns the run's newest complete checkpoint of an earlier step than `folder`."""
    step = _step(folder)
    for path in reversed(checkpoints(folder.parent)):
        if step is None or cast(int, _step(path)) < step:
            return path
    return None


def prune(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints in `run`; only rank 0 calls it.

    Renames each to `….pruned` before deleting it, so that no partly deleted checkpoint looks
    complete, and first deletes the `….pruned` folders of an interrupted call. Raises OSError where
    the disk refuses.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: the newest checkpoint is never deleted")
    for interrupted in run.glob("step-*.pruned"):
        shutil.rmtree(interrupted)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(old.name + ".pruned")))


def prepare(folder: Path) -> None:
    """Makes the empty `folder.partial`, after it has cleaned up after a crashed save."""
    run = folder.parent
    run.mkdir(parents=True, exist_ok=True)
    finish_replacement(folder)
    if folder.exists() and not is_complete(folder):
        raise UserError(f"{folder} exists and is not a checkpoint: move it away, then save again")
    for path in run.iterdir():
        if path == partial(folder) or _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path)
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
    if is_complete(folder):
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


def _step(folder: Path) -> int | None:
    """Returns the step in a checkpoint folder's name; None for other names."""
    match = _COMPLETE.fullmatch(folder.name)
    return int(match[1]) if match else None
