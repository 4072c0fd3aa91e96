"""Makes, opens and locks the folder of a run, and writes its recipe."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import (
    CHECKPOINTS,
    COMING,
    HOSTS,
    JOB,
    JOB_ENDS,
    JOB_SCRIPT,
    LOCK,
    RECIPE,
    SAVE,
    job_log,
)
from colonnade.launcher.train.lock import locked
from colonnade.launcher.train.resumable import check_resumable


class ResumePoint(NamedTuple):
    """Where a run goes on.

    Attributes:
        checkpoint: its path; None: the newest.
        automatic: the newest that is whole.
    """

    checkpoint: str | None = None
    automatic: bool = False


NEWEST = ResumePoint()
STEP = r"step-\d+"  # the name of a checkpoint that is whole


class OpenRun(NamedTuple):
    """A run's folder that this job has locked.

    Attributes:
        path: of the folder.
        resume: it has checkpoints to go on from; its new recipe is in `COMING` until one is loaded.
        adopted: one was loaded already, or there is none.
    """

    path: Path
    resume: bool
    adopted: bool = False

    @property
    def recipe(self) -> Path:
        """The file of the recipe that the ranks read."""
        return self.path / (COMING if self.resume and not self.adopted else RECIPE)


@contextmanager
def open_new(recipe: Recipe, runs: Path) -> Iterator[OpenRun]:
    """Makes the new folder `runs/NAME-TIME`, locks it, and writes the recipe into it.

    Raises:
        UserError: the folder cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    count = 0  # of runs with this name and second
    while True:
        folder = runs / (f"{recipe.name}-{stamp}-{count}" if count else f"{recipe.name}-{stamp}")
        try:
            folder.mkdir(parents=True)
            (folder / CHECKPOINTS).mkdir()
            break
        except FileExistsError:
            count += 1
        except OSError as error:
            raise UserError(f"{folder}: cannot make the run's folder: {error.strerror}") from error
    with locked(folder):
        write_recipe(recipe, folder / RECIPE)
        yield OpenRun(folder, False)


@contextmanager
def open_named(recipe: Recipe, folder: Path) -> Iterator[OpenRun]:
    """Makes a run's folder of this name and locks it, or locks the run that is there.

    Raises:
        UserError: the folder cannot be made, holds something else, or holds a run whose model, data
            or optimizer are not the recipe's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the run's folder: {error.strerror}") from error
    check_new_or_run(folder)
    from colonnade.launcher.checkpoint import newest  # imports torch, which takes seconds

    with locked(folder):
        if (folder / RECIPE).is_file() and newest(folder / CHECKPOINTS):
            check_resumable(saved_recipe(folder), recipe, newest_step(folder))
            write_recipe(recipe, folder / COMING)
            yield OpenRun(folder, True)
            return
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        write_recipe(recipe, folder / RECIPE)
        yield OpenRun(folder, False)


def check_new_or_run(folder: Path) -> None:
    """Raises UserError unless a folder is a run, or empty but for what a job that was killed before
    it wrote its recipe has left, and for the files of a job that was submitted."""
    if (folder / RECIPE).is_file():
        return
    own = {CHECKPOINTS, SAVE, f"{RECIPE}.new", JOB, JOB_SCRIPT, JOB_ENDS, HOSTS}
    own |= {path.name for path in folder.glob(job_log("*"))}
    others = [path.name for path in folder.iterdir() if path.name not in own]
    others = [name for name in others if not name.startswith(LOCK)]
    if (folder / CHECKPOINTS).is_dir():
        others += [path.name for path in (folder / CHECKPOINTS).iterdir()]
    if others:
        raise UserError(
            f"--run {folder}: it is no run ({RECIPE} is missing) and holds {min(others)}; name a "
            "new or an empty folder"
        )


@contextmanager
def open_existing(recipe: Recipe, folder: Path) -> Iterator[OpenRun]:
    """Locks an existing run's folder, and writes the new recipe there next to the old one.

    The old recipe stays in force until the checkpoint has been loaded (`adopt`).
    """
    with locked(folder):
        write_recipe(recipe, folder / COMING)
        yield OpenRun(folder, True)


def run_of(path: Path) -> tuple[Path, str | None]:
    """Returns the run's folder of a path, and the checkpoint in it if the path is that of one.

    Raises:
        UserError: the checkpoint was set aside.
    """
    folder = path.absolute().parent
    if folder.name != CHECKPOINTS or (path / RECIPE).is_file():
        return path, None
    if not re.fullmatch(STEP, path.name):
        raise UserError(
            f"--resume {path}: a run goes on from a folder step-N; rename it to that, if it is to "
            "take the place of what the run has"
        )
    return folder.parent, str(path.absolute())


def newest_step(folder: Path) -> int:
    """Returns the step of a run's newest checkpoint; 0 without one."""
    names = [path.name for path in (folder / CHECKPOINTS).glob("step-*")]
    return max((step_in(name) for name in names if re.fullmatch(STEP, name)), default=0)


def step_in(name: str) -> int:
    """Returns the step of a checkpoint's name."""
    return int(name.partition("-")[2])


def adopt(folder: Path) -> None:
    """Replaces the run's recipe by the new one, after the checkpoint was loaded under it."""
    if (folder / COMING).exists():
        os.replace(folder / COMING, folder / RECIPE)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe, defaults included; the file is whole or is the one that was there."""
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(dump_recipe(recipe))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the recipe: {error.strerror}; free space, or make "
            "the folder writable"
        ) from error


def saved_recipe(folder: Path) -> Recipe:
    """The recipe with which a run was trained. Raises UserError if there is no run."""
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder}: no run here ({RECIPE} is missing); name a folder under runs/")
    return load_recipe(folder / RECIPE)
