"""Opens and locks a run's folder, and checks which recipe fields may change on resumption."""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from colonnade.launcher.errors import Fault, RecipeError, UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import Recipe

RECIPE = "recipe.toml"
LOCK = ".lock"  # locked by the process that trains the run
COMING = "recipe.coming.toml"  # the new recipe of a resumed run, until its checkpoint is loaded


@contextmanager
def open_new(recipe: Recipe, runs: Path) -> Iterator[Path]:
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
            (folder / "checkpoints").mkdir()
            break
        except FileExistsError:
            count += 1
        except OSError as error:
            raise UserError(f"{folder}: cannot make the run's folder: {error.strerror}") from error
    with locked(folder):
        write_recipe(recipe, folder / RECIPE)
        yield folder


@contextmanager
def open_existing(recipe: Recipe, folder: Path) -> Iterator[Path]:
    """Locks an existing run's folder, and writes the new recipe there next to the old one.

    The old recipe stays in force until the checkpoint has been loaded (`adopt`).
    """
    with locked(folder):
        write_recipe(recipe, folder / COMING)
        yield folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run's folder against all other processes of this host.

    Processes of other hosts are kept out where the file system shares locks between hosts.

    Raises:
        UserError: another process trains this run.
    """
    try:
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot write in the run's folder: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{folder}: {lock.read().strip() or 'another process'} trains this run; wait for "
                "its end, or stop it, then resume"
            ) from None
        except OSError as error:  # a file system without locks
            print(
                f"colonnade: {folder} cannot be locked ({error.strerror}): see to it that no other "
                "process trains this run",
                file=sys.stderr,
            )
        else:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        yield


def adopt(folder: Path) -> None:
    """Replaces the run's recipe by the new one, after the checkpoint was loaded under it."""
    if (folder / COMING).exists():
        os.replace(folder / COMING, folder / RECIPE)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe, defaults included."""
    try:
        path.write_text(dump_recipe(recipe), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write the recipe: {error.strerror}") from error


def saved_recipe(folder: Path) -> Recipe:
    """The recipe with which a run was trained. Raises UserError if there is no run."""
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder}: no run here ({RECIPE} is missing); name a folder under runs/")
    return load_recipe(folder / RECIPE)


def check_resumable(saved: Recipe, wanted: Recipe) -> None:
    """Raises RecipeError where the model, the kind of optimizer or the samples would change.

    The layout, the optimizer's numbers, precision, the number of steps and reports may change. The
    paths of tokenizer and data files may change, too: the checkpoint identifies them by content.
    """

    def fixed_fields(recipe: Recipe) -> dict[str, object]:
        train = ("seed", "seq_len", "global_batch", "ramp_batch", "ramp_steps")
        may_change = {"path", "column"}
        fields: dict[str, object] = {f"train.{f}": getattr(recipe.train, f) for f in train}
        fields |= {f"model.{f}": value for f, value in recipe.model.model_dump().items()}
        # Fields that follow from others do so in muP's base as well: a field that is given at the
        # value it had by default changes the base alone.
        if base := recipe.model.base():
            fields |= {f"model.mup_base.{f}": value for f, value in base.model_dump().items()}
        fields["optimizer.name"] = recipe.optimizer.name
        fields["data.validation"] = recipe.data.validation
        fields["data.packing"] = recipe.data.packing
        fields["data.sources"] = [s.model_dump(exclude=may_change) for s in recipe.data.sources]
        return fields

    required = fixed_fields(saved)
    faults = [
        Fault(
            field,
            value,
            f"the run began with {required[field]!r}, and a run keeps its model, its optimizer and "
            "the order of its data; leave it, or start a new run",
        )
        for field, value in fixed_fields(wanted).items()
        if field in required and value != required[field]
    ]
    if faults:
        raise RecipeError(faults)
