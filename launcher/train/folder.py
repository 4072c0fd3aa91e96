"""A run's folder: how it is opened, and what of its recipe may change when it is resumed."""

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
LOCK = ".lock"  # held by the process that trains the run
COMING = "recipe.coming.toml"  # of a resumed run, until its checkpoint has taken it


@contextmanager
def open_new(recipe: Recipe, runs: Path) -> Iterator[Path]:
    """Make `runs/NAME-TIME`, which nothing else has, with the recipe in it, and hold it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    again = 0
    while True:
        folder = runs / (f"{recipe.name}-{stamp}-{again}" if again else f"{recipe.name}-{stamp}")
        try:
            folder.mkdir(parents=True)
            (folder / "checkpoints").mkdir()
            break
        except FileExistsError:
            again += 1
        except OSError as error:
            raise UserError(f"{folder}: cannot make the run's folder: {error.strerror}") from error
    with held(folder):
        write_recipe(recipe, folder / RECIPE)
        yield folder


@contextmanager
def open_again(recipe: Recipe, folder: Path) -> Iterator[Path]:
    """Hold a run's folder, with the coming recipe beside the old, until the checkpoint fits it."""
    with held(folder):
        write_recipe(recipe, folder / COMING)
        yield folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder against every other process, on this host and, where locks reach, others.

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
    """The checkpoint fits: the coming recipe is the run's recipe."""
    if (folder / COMING).exists():
        os.replace(folder / COMING, folder / RECIPE)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as resolved."""
    try:
        path.write_text(dump_recipe(recipe), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write the recipe: {error.strerror}") from error


def saved_recipe(folder: Path) -> Recipe:
    """The recipe a run was trained with. UserError where there is no run."""
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder}: no run here ({RECIPE} is missing); name a folder under runs/")
    return load_recipe(folder / RECIPE)


def check_resumable(saved: Recipe, wanted: Recipe) -> None:
    """Refuse, as RecipeError, another model, another kind of optimizer, or other samples.

    Layout, the optimizer's numbers, precision, length and reports may change. Where tokenizer and
    files lie may, too: the checkpoint knows them by their content.
    """

    def fixed(recipe: Recipe) -> dict[str, object]:
        train = ("seed", "seq_len", "global_batch", "ramp_batch", "ramp_steps")
        source = {"path", "column"}
        fields: dict[str, object] = {f"train.{f}": getattr(recipe.train, f) for f in train}
        fields |= {f"model.{f}": value for f, value in recipe.model.model_dump().items()}
        fields["optimizer.name"] = recipe.optimizer.name
        fields["data.validation"] = recipe.data.validation
        fields["data.packing"] = recipe.data.packing
        fields["data.sources"] = [s.model_dump(exclude=source) for s in recipe.data.sources]
        return fields

    before = fixed(saved)
    faults = [
        Fault(
            field,
            value,
            f"the run began with {before[field]!r}, and a run keeps its model, its optimizer and "
            "the order of its data; leave it, or start a new run",
        )
        for field, value in fixed(wanted).items()
        if value != before[field]
    ]
    if faults:
        raise RecipeError(faults)
