"""Fixtures of the launcher's tests: recipes written to a file, and their faults."""

from collections.abc import Callable
from pathlib import Path

import pytest

from colonnade.launcher.errors import Fault, RecipeError
from colonnade.launcher.recipe.load import load_recipe

Write = Callable[[str], Path]
Faults = Callable[..., list[Fault]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a recipe's file of its text."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def faults(write: Write) -> Faults:
    """The faults of a recipe (empty if without text) with overrides."""

    def faults(*overrides: str, text: str = "", world_size: int | None = None) -> list[Fault]:
        try:
            load_recipe(write(text), overrides, world_size)
        except RecipeError as error:
            return error.faults
        return []

    return faults
