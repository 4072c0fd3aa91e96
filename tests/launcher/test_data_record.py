"""Records of token files: their content, and what a run and a dry run check with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_tokenizer import train

from colonnade.launcher.data import IndexedWriter, check_data, data, open_data, read_indexed
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig
from colonnade.launcher.recipe.validate import validate
from colonnade.models.config import ModelConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with text, a tokenizer, and the text's token files by it and by bytes."""
    train(tmp_path / "t.json", True)
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50))
    (tmp_path / "a.jsonl").write_text(lines)
    data(str(tmp_path / "a.jsonl"), tmp_path / "bytes")
    data(str(tmp_path / "a.jsonl"), tmp_path / "bpe", tokenizer=str(tmp_path / "t.json"))
    return tmp_path


def recipe(path: Path, vocab: int, format: str = "tokens", **options: Any) -> Recipe:
    source = SourceConfig(format=format, path=str(path))  # type: ignore[arg-type]
    return Recipe(
        model=ModelConfig(vocab=vocab),
        data=DataConfig(sources=(source,), cache=str(path.parent / "cache"), **options),
        train=TrainConfig(seq_len=8),
    )


def refusal(recipe: Recipe) -> str:
    """Returns the error of opening the data, which is the same from `check_data`."""
    messages = set()
    for action in (check_data, open_data):
        with pytest.raises(UserError) as caught:
            action(recipe)
        messages.add(str(caught.value))
    [message] = messages
    return message


def test_the_record_names_the_tokenizer_and_counts_the_tokens(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    read = read_indexed(folder / "bpe")
    record = read.record
    assert record is not None
    assert record.name == str(folder / "t.json")
    assert (record.documents, record.tokens) == (50, len(read.tokens))
    assert record.largest == max(read.tokens.tolist())
    assert record.vocabulary > record.largest
    assert record.fingerprint != "bytes"
    assert len(IndexedDataset(str(folder / "bpe"))) == 50  # Megatron ignores the record
    content = read_indexed(folder / "bytes").content
    data(str(folder / "a.jsonl"), folder / "bytes", overwrite=True)
    assert read_indexed(folder / "bytes").content == content != read.content


def test_a_record_of_other_tokens_is_refused(folder: Path) -> None:
    other = json.loads((folder / "bytes.record.json").read_text())
    other["tokens"] += 1
    (folder / "bytes.record.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"bytes\.record\.json describes"):
        read_indexed(folder / "bytes")
    (folder / "bytes.record.json").write_text("{}")
    with pytest.raises(UserError, match=r"bytes\.record\.json is no record of tokens"):
        read_indexed(folder / "bytes")
    with IndexedWriter(folder / "bytes", np.dtype("<u2")) as writer:  # no tokenizer given
        writer.add(np.arange(9))
    assert read_indexed(folder / "bytes").record is None


def test_tokens_of_another_tokenizer_or_vocabulary_are_refused(folder: Path) -> None:
    bpe = str(folder / "t.json")
    message = refusal(recipe(folder / "bpe", 512, tokenizer="bytes"))
    assert (
        f"data.tokenizer = 'bytes': {folder / 'bpe.bin'} was made by another tokenizer" in message
    )
    assert "was made by another tokenizer, 'bytes'" in refusal(
        recipe(folder / "bytes", 512, tokenizer=bpe)
    )
    assert "model.vocab = 128256" in (message := refusal(recipe(folder / "bytes", 128256)))
    assert "was made by 'bytes' of 257 tokens, so most of the vocabulary" in message
    assert "model.vocab = 256" in refusal(recipe(folder / "bytes", 256))
    # A large vocabulary is accepted if the tokenizer is named, a moved tokenizer is the same one,
    # and a vocabulary that is slightly larger needs no tokenizer.
    check_data(recipe(folder / "bytes", 128256, tokenizer="bytes"))
    (folder / "t.json").rename(folder / "moved.json")
    check_data(recipe(folder / "bpe", 512, tokenizer=str(folder / "moved.json")))
    check_data(recipe(folder / "bytes", 512))


def test_tokens_without_a_record_are_sampled(folder: Path) -> None:
    with IndexedWriter(folder / "bpe", np.dtype("<u2")) as writer:
        writer.add(np.arange(100, 301))
    bytes_recipe = recipe(folder / "bpe", 512, tokenizer="bytes")
    assert "and data.tokenizer has 257 tokens" in refusal(bytes_recipe)
    tokens = np.zeros(1 << 22, np.uint16)
    tokens[100_000] = 300  # between the samples
    with IndexedWriter(folder / "bpe", np.dtype("<u2")) as writer:
        writer.add(tokens)
    rows = open_data(bytes_recipe.model_copy(update={"train": TrainConfig(seq_len=1 << 12)})).train
    with pytest.raises(UserError, match=r"holds the token id 300, and data\.tokenizer has 257"):
        rows.batch(range(1 << 10))


def test_a_large_vocabulary_must_name_the_tokenizer_bytes() -> None:
    config = SourceConfig(format="text", path="x")
    wide = Recipe(model=ModelConfig(vocab=128256), data=DataConfig(sources=(config,)))
    assert [f.field for f in validate(wide, 1)] == ["data.tokenizer"]
    named = DataConfig(sources=(config,), tokenizer="bytes")
    assert validate(wide.model_copy(update={"data": named}), 1) == []
    assert validate(wide.model_copy(update={"model": ModelConfig(vocab=512)}), 1) == []


def test_a_check_tokenises_nothing(folder: Path) -> None:
    assert "1 files, 1,190 bytes" in check_data(recipe(folder / "a.jsonl", 257, "jsonl"))[0]
    assert "rows of 8" in check_data(recipe(folder / "bytes", 257))[0]
    assert not (folder / "cache").exists()
    for kind in ("jsonl", "tokens"):  # a recipe may be checked without its data
        (line,) = check_data(recipe(folder / "none", 257, kind))
        assert line.endswith("none' is not on this machine: not checked")
    (folder / "b.jsonl").write_text('{"body": "a"}\n')
    assert "b.jsonl, line 1 has the columns 'body'" in refusal(
        recipe(folder / "b.jsonl", 257, "jsonl")
    )
    (folder / "b.jsonl").write_text('{"text": ""}\n')
    assert "is an empty corpus" in refusal(recipe(folder / "b.jsonl", 257, "jsonl"))
    with pytest.raises(RecipeError, match=r"model\.vocab = 256"):
        check_data(recipe(folder / "a.jsonl", 256, "jsonl"))
