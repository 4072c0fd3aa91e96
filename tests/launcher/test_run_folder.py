"""A run's folder is locked by one process, and keeps the recipe's fixed fields."""

import subprocess
import sys
from pathlib import Path

import pytest

from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.tables import DataConfig, OptimizerConfig, Recipe
from colonnade.launcher.train.folder import COMING, RECIPE, check_resumable, open_existing, open_new
from colonnade.models.config import ModelConfig

RESUMES = """
import sys
from pathlib import Path
from colonnade.launcher.errors import UserError
from colonnade.launcher.train.folder import open_existing
from colonnade.launcher.recipe.tables import Recipe
try:
    with open_existing(Recipe(), Path(sys.argv[1])):
        print("locked")
except UserError as mistake:
    print(mistake)
"""


def resume_in_other_process(folder: Path) -> str:
    command = [sys.executable, "-c", RESUMES, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_run_is_locked_against_other_processes(tmp_path: Path) -> None:
    """The lock belongs to the process: it ends with it, also when that is killed."""
    with open_new(Recipe(), tmp_path) as folder:
        (message,) = resume_in_other_process(folder).splitlines()
        assert "trains this run" in message
        assert str(folder) in message
        assert not (folder / COMING).exists()
    with open_existing(Recipe(), folder), pytest.raises(UserError), open_existing(Recipe(), folder):
        pass
    assert resume_in_other_process(folder) == "locked\n"
    assert (folder / RECIPE).exists()


def test_paths_of_data_may_change_and_packing_may_not() -> None:
    """The checkpoint identifies the data by their content."""

    def recipe(**fields: str) -> Recipe:
        return Recipe(data=DataConfig(**fields))  # type: ignore[arg-type]

    check_resumable(recipe(tokenizer="a/tokenizer.json"), recipe(tokenizer="b/tokenizer.json"))
    with pytest.raises(RecipeError, match=r"data\.packing = 'whole'"):
        check_resumable(recipe(), recipe(packing="whole"))


def test_a_size_that_only_the_base_model_takes_over_may_not_change() -> None:
    """Under muP a derived size that is set to its own value becomes the base's as well."""

    def recipe(**fields: int) -> Recipe:
        return Recipe(model=ModelConfig(hidden=256, heads=4, mup_base={"hidden": 128}, **fields))

    check_resumable(recipe(), recipe())
    with pytest.raises(RecipeError, match=r"mup_base\.head_dim = 64: the run began with 32"):
        check_resumable(recipe(), recipe(head_dim=64))


def test_the_kind_of_optimizer_stays() -> None:
    """Its numbers may change; the checkpoint does not hold the state of another optimizer."""
    fast, muon = OptimizerConfig(lr=0.5), OptimizerConfig(name="muon")
    check_resumable(Recipe(), Recipe(optimizer=fast))
    with pytest.raises(RecipeError, match=r"optimizer\.name = 'muon': the run began with 'adamw'"):
        check_resumable(Recipe(), Recipe(optimizer=muon))


def test_runs_of_one_second_have_different_folders(tmp_path: Path) -> None:
    with open_new(Recipe(), tmp_path) as one, open_new(Recipe(), tmp_path) as two:
        assert one != two
