"""Who holds a run's folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.tables import DataConfig, OptimizerConfig, Recipe
from colonnade.launcher.train.folder import COMING, RECIPE, check_resumable, open_again, open_new

RESUMES = """
import sys
from pathlib import Path
from colonnade.launcher.errors import UserError
from colonnade.launcher.train.folder import open_again
from colonnade.launcher.recipe.tables import Recipe
try:
    with open_again(Recipe(), Path(sys.argv[1])):
        print("held")
except UserError as mistake:
    print(mistake)
"""


def resumed_elsewhere(folder: Path) -> str:
    words = [sys.executable, "-c", RESUMES, str(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_a_run_is_held_against_other_processes(tmp_path: Path) -> None:
    """One that was killed holds nothing: the lock is the process's."""
    with open_new(Recipe(), tmp_path) as folder:
        (told,) = resumed_elsewhere(folder).splitlines()
        assert "trains this run" in told
        assert str(folder) in told
        assert not (folder / COMING).exists()
    with open_again(Recipe(), folder), pytest.raises(UserError), open_again(Recipe(), folder):
        pass
    assert resumed_elsewhere(folder) == "held\n"
    assert (folder / RECIPE).exists()


def test_where_data_lie_may_change_and_how_they_are_packed_may_not() -> None:
    """What is read is known by its content, which the checkpoint holds."""

    def recipe(**fields: str) -> Recipe:
        return Recipe(data=DataConfig(**fields))  # type: ignore[arg-type]

    check_resumable(recipe(tokenizer="a/tokenizer.json"), recipe(tokenizer="b/tokenizer.json"))
    with pytest.raises(RecipeError, match=r"data\.packing = 'whole'"):
        check_resumable(recipe(), recipe(packing="whole"))


def test_the_kind_of_optimizer_stays() -> None:
    """Its numbers may change; the state of another rule is not in the checkpoint."""
    fast, muon = OptimizerConfig(lr=0.5), OptimizerConfig(name="muon")
    check_resumable(Recipe(), Recipe(optimizer=fast))
    with pytest.raises(RecipeError, match=r"optimizer\.name = 'muon': the run began with 'adamw'"):
        check_resumable(Recipe(), Recipe(optimizer=muon))


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    with open_new(Recipe(), tmp_path) as one, open_new(Recipe(), tmp_path) as two:
        assert one != two
