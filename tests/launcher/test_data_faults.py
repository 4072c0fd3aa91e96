"""Data that change or fail during a run: all ranks report one message, and the run is saved."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks

from colonnade.launcher.checkpoint import newest
from colonnade.launcher.data import IndexedWriter, read_indexed
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.monitor import Monitor
from colonnade.parallel.world import World

Make = Callable[..., Recipe]
S, STEPS, BATCH = 16, 6, 4


def write_tokens(prefix: Path, bad: int | None = None) -> None:
    """Writes a token file of 32 rows; the token at `bad`, if given, is beyond the vocabulary."""
    tokens = np.random.default_rng(0).integers(0, 60, 32 * S + 1).astype(np.uint16)
    if bad is not None:
        tokens[bad] = 1234
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        writer.add(tokens)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Returns a function that loads a tiny recipe with overrides; its data are in `tmp_path`."""
    text = f"""
[model]
pattern = "*-"
hidden = 16
heads = 2
ffn = 24
vocab = 64
[data]
validation = 0.0
[[data.sources]]
format = "tokens"
path = "{tmp_path / "tokens"}"
[train]
steps = {STEPS}
global_batch = {BATCH}
micro_batch = 1
seq_len = {S}
precision = "fp64"
"""
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return lambda *overrides: load_recipe(path, overrides, None)


def job_error(
    rank: int, size: int, recipe: Recipe, run: Path, damage: str, file: Path, resume: bool = False
) -> str:
    """Runs a rank's job and returns its error; rank 0 damages `file` after the second step."""
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "recipe.toml").write_text(dump_recipe(recipe))
    report = Monitor.step

    def step(monitor: Monitor, metrics: dict, *arguments: object) -> None:
        report(monitor, metrics, *arguments)  # type: ignore[arg-type]
        if metrics["step"] == 2:
            os.truncate(file, 2 * S) if damage == "truncate" else file.unlink()

    if damage:
        Monitor.step = step  # type: ignore[method-assign]
    try:
        run_job(recipe, run, World(rank, size, torch.device("cpu")), resume)
    except UserError as error:
        return str(error)
    finally:
        Monitor.step = report  # type: ignore[method-assign]
    return ""


def run_ranks(ranks: Ranks, recipe: Recipe, run: Path, damage: str, file: Path) -> tuple[str, int]:
    """Returns the one message with which all ranks ended, and the newest checkpoint's step."""
    messages = set(ranks.run(job_error, recipe, run, damage, file))
    [message] = messages
    assert message
    saved = newest(run / "checkpoints")
    step = json.loads((saved / "state.json").read_text())["step"] if saved else 0
    assert (f"(the run is saved after step {step})" in message) == (step > 0)
    return message, step


def test_tokens_truncated_during_a_run(ranks2: Ranks, make: Make, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    file = tmp_path / "tokens.bin"
    message, step = run_ranks(ranks2, make(), tmp_path / "run", "truncate", file)
    assert f"{file} was cut short while it was read: it holds 32 bytes of 1026" in message
    assert 2 <= step < STEPS


@pytest.mark.parametrize("bad", [3 * S + 5, 17 * S])
def test_a_token_beyond_the_vocabulary_on_one_rank(
    bad: int, ranks2: Ranks, make: Make, tmp_path: Path
) -> None:
    write_tokens(tmp_path / "tokens", bad)
    none = tmp_path / "none"
    message, step = run_ranks(ranks2, make("train.steps=8"), tmp_path / "run", "", none)
    assert "tokens.bin holds the token id 1234, but model.vocab = 64" in message
    # The run is saved before the step that would read the token, in any order of the rows.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, step + 1))
    assert step < 8


def test_validation_tokens_that_cannot_be_read(ranks2: Ranks, make: Make, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    tokens = read_indexed(tmp_path / "tokens").tokens[:].copy()
    tokens[-40] = 1234  # in a document that is held out
    with IndexedWriter(tmp_path / "tokens", np.dtype("<u2")) as writer:
        for document in np.array_split(tokens, 16):
            writer.add(document)
    recipe = make("data.validation=0.1", "train.validate_every=2", "checkpoint.every=2")
    messages = ranks2.run(job_error, recipe, tmp_path / "run", "", tmp_path / "none")
    assert set(messages) == {messages[0]}
    assert "token id 1234" in messages[0]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").exists()


def stream_recipe(make: Make, folder: Path, steps: int) -> Recipe:
    """Writes two files, and returns a recipe that streams them."""
    for name in ("a", "b"):
        text = json.dumps({"text": name * 100}) + "\n"
        (folder / f"{name}.jsonl").write_text(text * (1 if name == "b" else 3))
    return make(
        *("data.sources.0.format=jsonl", f"data.sources.0.path={folder}/*.jsonl"),
        *("data.sources.0.stream=true", "data.validation=", "model.vocab=264"),
        *("train.validate_rows=", f"train.steps={steps}"),
    )


def test_files_that_changed_since_the_save(ranks2: Ranks, make: Make, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    none = tmp_path / "none"
    recipes = {
        "tokens.bin": lambda steps: make(f"train.steps={steps}"),
        "b.jsonl": lambda steps: stream_recipe(make, tmp_path, steps),
    }
    for name, recipe_of in recipes.items():
        run, file = tmp_path / f"run-{name}", tmp_path / name
        assert ranks2.run(job_error, recipe_of(2), run, "", none) == ["", ""]
        longer, stat = recipe_of(4), file.stat()
        file.write_bytes(bytes([*file.read_bytes()[:20], 65, *file.read_bytes()[21:]]))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        messages = set(ranks2.run(job_error, longer, run, "", none, True))
        [message] = messages
        assert name in message
        assert "when the run was saved" in message or "when it was saved" in message


def test_a_stream_whose_file_is_deleted(ranks2: Ranks, make: Make, tmp_path: Path) -> None:
    recipe = stream_recipe(make, tmp_path, 40)
    file = tmp_path / "b.jsonl"
    message, step = run_ranks(ranks2, recipe, tmp_path / "run", "unlink", file)
    assert f"cannot read {file}: No such file" in message
    assert 2 <= step < 40
