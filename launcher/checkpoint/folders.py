"""The folders of a run's checkpoints: their names, which are complete, and how one is committed."""

import os
import re
import shutil
from pathlib import Path
from typing import cast

from colonnade.launcher.errors import UserError

STATE = "state.json"
TENSORS = "tensors.json"
# While a step is saved again, its older copy bears `.replaced` for the instant between two renames.
_COMPLETE = re.compile(r"step-(\d+)(\.replaced)?")
_PARTIAL = re.compile(r"step-\d+\.partial")


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in the folder of a run's checkpoints."""
    return run / f"step-{step:08d}"


def partial(folder: Path) -> Path:
    """Where the checkpoint `folder` is written until it is committed."""
    return folder.with_name(folder.name + ".partial")


def replaced(folder: Path) -> Path:
    """Where the older checkpoint of the same name waits while `folder` is committed."""
    return folder.with_name(folder.name + ".replaced")


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint: it got its name only after all of it was on disk."""
    return (folder / STATE).is_file() and (folder / TENSORS).is_file()


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints in `run`, oldest step first; none where there is no such folder."""
    found: dict[int, Path] = {}
    for path in sorted(run.iterdir()) if run.is_dir() else []:  # step-N before step-N.replaced
        if (step := _step(path)) is not None and is_complete(path):
            found.setdefault(step, path)
    return [found[step] for step in sorted(found)]


def newest(run: Path) -> Path | None:
    """The complete checkpoint of the highest step in `run`, the folder of a run's checkpoints."""
    return next(reversed(checkpoints(run)), None)


def earlier(folder: Path) -> Path | None:
    """The newest complete checkpoint beside `folder` and of an earlier step."""
    step = _step(folder)
    for path in reversed(checkpoints(folder.parent)):
        if step is None or cast(int, _step(path)) < step:
            return path
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints in `run`; for rank 0 alone.

    Each is renamed to `….pruned` before it is deleted, so that none is ever seen half deleted;
    what an interrupted call left behind goes too. OSError where the disk refuses.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: the newest checkpoint is never deleted")
    for remains in run.glob("step-*.pruned"):
        shutil.rmtree(remains)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(old.name + ".pruned")))


def prepare(folder: Path) -> None:
    """Make the empty `folder.partial`, after removing what a crash left behind."""
    run = folder.parent
    run.mkdir(parents=True, exist_ok=True)
    restore(folder)
    if folder.exists() and not is_complete(folder):
        raise UserError(f"{folder} exists and is not a checkpoint: move it away, then save again")
    for path in run.iterdir():
        if path == partial(folder) or _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path)
    partial(folder).mkdir()


def commit(folder: Path) -> None:
    """Give `folder.partial`, complete and on disk, its name; an older `folder` makes room."""
    sync(partial(folder))
    if folder.exists():
        folder.rename(replaced(folder))
    partial(folder).rename(folder)
    sync(folder.parent)


def restore(folder: Path) -> None:
    """End a replacement: the older copy goes where the new one stands, and comes back where not."""
    if not replaced(folder).exists():
        return
    if is_complete(folder):
        shutil.rmtree(replaced(folder))
    else:
        replaced(folder).rename(folder)


def write(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, down to the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(folder: Path) -> int | None:
    match = _COMPLETE.fullmatch(folder.name)
    return int(match[1]) if match else None
