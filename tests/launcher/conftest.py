"""Fixtures of the launcher's tests: recipes in a file, their faults, and caches in a folder."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import preloaded_context
from slurm_commands import SlurmCommands

from colonnade.launcher.data import IndexedWriter
from colonnade.launcher.data.indexed import token_dtype
from colonnade.launcher.errors import Fault, RecipeError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe

Write = Callable[[str], Path]
Faults = Callable[..., list[Fault]]
TOKENS = 50  # vocabulary of `tokens`


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


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file of random documents."""
    prefix = tmp_path_factory.mktemp("tokens") / "random"
    generator = torch.Generator().manual_seed(3)
    with IndexedWriter(prefix, token_dtype(TOKENS)) as writer:
        for length in torch.randint(2, 40, (200,), generator=generator).tolist():
            writer.add(torch.randint(0, TOKENS, (length,), generator=generator).numpy())
    return prefix


@pytest.fixture
def recipe(tokens: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A tiny recipe with overrides."""
    text = f"""
name = "tiny"
[model]
pattern = "M-*E"
residual = "ladder"
hidden = 16
heads = 2
ffn = 24
vocab = {TOKENS}
mamba_head_dim = 8
mamba_state = 4
mamba_chunk = 5
experts = 3
[optimizer]
lr = 0.01
warmup = 2
[data]
validation = 0.2
[[data.sources]]
format = "tokens"
path = "{tokens}"
[train]
steps = 8
global_batch = 8
micro_batch = 2
seq_len = 16
precision = "fp64"
validate_rows = 7
"""
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return lambda *overrides: load_recipe(path, overrides, None)


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


@pytest.fixture
def slurm(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> SlurmCommands:
    """Puts stand-ins for SLURM's commands in front of PATH."""
    folder = tmp_path_factory.mktemp("slurm")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return SlurmCommands(folder)
