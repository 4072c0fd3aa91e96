"""Fixtures of the launcher's tests: recipes in a file, their faults, and caches in a folder."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import preloaded_context

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


@pytest.fixture
def preloaded_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts the processes of a benchmark from the fork server of the ranks: a spawned one would
    import torch again."""
    context = preloaded_context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.fixture
def temporary_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the caches of colonnade and datasets into the test's folder, and turns the hub off."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
