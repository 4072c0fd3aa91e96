"""The README: its table is the one that the tests' parameter lists make, and its examples run."""

import json
import re
from pathlib import Path

import matrix as parity_matrix
import pytest
from shown import README, in_readme, shown, table
from transformers import LlamaConfig, LlamaForCausalLM

from colonnade.launcher.cli import main
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.verify.matrix import matrix
from colonnade.models.config import CARDS

TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced examples in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_table_is_the_tests() -> None:
    """After a change of a list: python tests/shown.py --write."""
    assert in_readme(TEXT, table()) == TEXT


def test_the_matrix_is_that_of_the_stored_report() -> None:
    """After a run: python tests/matrix.py --write REPORT."""
    report = parity_matrix.stored()
    assert parity_matrix.in_readme(TEXT, matrix(report)) == TEXT
    for one in report["recipes"]:
        assert one["layouts"]
        assert all(result["equal"] for result in one["layouts"])


def test_every_symbol_is_in_it() -> None:
    rows = [row for row in shown() if not any(c.islower() for c in row.symbols[1:])]
    assert set(CARDS) <= {symbol for row in rows for symbol in row.symbols}


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for paths, and the ranks and steps of a run."""
    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "path/of/a/model")
    quick = 'train.steps=2", "train.sample=0", "train.validate_rows=8'
    ran = 0
    for example in blocks("python"):
        shorter = example.replace("train.steps=20", quick).replace("nproc=2", "nproc=1")
        exec(compile(shorter, "README.md", "exec"), {})
        ran += 1
    assert ran == 3
    assert (tmp_path / "path/of/another/model.safetensors").exists()
    again = json.loads((tmp_path / "path/of/another/config.json").read_text())
    assert (again["bos_token_id"], again["eos_token_id"], again["pad_token_id"]) == (1, 2, 0)


def test_the_recipe_of_ones_own_data_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (recipe,) = (block for block in blocks("toml") if 'name = "mine"' in block)
    Path("mine.toml").write_text(recipe)
    rows = [{"question": f"What is {i} + {i}?", "answer": f" It is {2 * i}."} for i in range(900)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["train", "mine.toml", "train.steps=2", "train.sample=5"]) == 0
    (run,) = Path("runs").iterdir()
    assert load_recipe(run / "recipe.toml").data.packing == "whole"


def test_the_stages_are_a_recipe(tmp_path: Path) -> None:
    """Behind the recipe of one's own data, on the ranks that its layouts need."""
    own, stages = (next(b for b in blocks("toml") if t in b) for t in ("mine", "[[stage]]"))
    path = tmp_path / "staged.toml"
    path.write_text(own.replace("steps = 200\n", "") + stages)
    first, second, third = training_stages(load_recipe(path, world_size=2))
    assert (first.stop, second.recipe.train.seq_len, second.recipe.parallel.cp) == (1000, 8192, 2)
    assert second.steps == -(-50_000_000 // (32 * 8192))
    assert third.recipe.train.freeze == ("embedding.*", "blocks.[0-9].*")
