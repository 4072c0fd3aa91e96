"""Sources: documents of every format, and one message for each fault."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from colonnade.launcher.data import check_data, open_data, read_indexed, tokenise
from colonnade.launcher.data.rows import Tokens, slice_rows
from colonnade.launcher.data.sources import read_documents
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig
from colonnade.models.config import ModelConfig

pytestmark = pytest.mark.usefixtures("temporary_caches")

TEXTS = ["first text", "zweiter Text\nmit ä und 漢", "third", "x" * 40]
PROMPTS = ["Q: ", "", "asked", "?"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Writes the same documents in every format."""
    folder = tmp_path / "corpus"
    (folder / "text" / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        subfolder = folder / "text" / ("deep" if i == 1 else "")
        (subfolder / f"{'abcd'[i]}[1]*.txt").write_text(text)
    (folder / "text" / ".hidden").write_text("no")
    (folder / "text" / "empty").write_text("")
    columns = {"prompt": PROMPTS, "text": TEXTS, "number": [1, 2, 3, 4]}
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "jsonl").mkdir()
    (folder / "jsonl" / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:2]))
    (folder / "jsonl" / "b.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[2:]))
    (folder / "jsonl" / "notes.md").write_text("no")
    (folder / "parquet").mkdir()
    pq.write_table(pa.table(columns), folder / "parquet" / "a.parquet")
    return folder


def expected(texts: list[str], prompts: list[str] | None = None) -> tuple[list[int], list[int]]:
    """Returns the tokens and mask of documents under the byte tokenizer."""
    tokens: list[int] = []
    mask: list[int] = []
    for text, prompt in zip(texts, prompts or [""] * len(texts), strict=True):
        tokens += [*prompt.encode(), *text.encode(), 256]
        mask += [0] * len(prompt.encode()) + [1] * (len(text.encode()) + 1)
    return tokens, mask


def recipe(*sources: SourceConfig, vocab: int = 257, seq_len: int = 8, **data: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(vocab=vocab),
        data=DataConfig(sources=sources, **data),
        train=TrainConfig(seq_len=seq_len),
    )


def write_lines(path: Path, count: int) -> SourceConfig:
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(count)))
    return SourceConfig(format="jsonl", path=str(path))


@pytest.mark.parametrize(
    ("format", "prompted"),
    [("text", False), *((f, p) for f in ("jsonl", "parquet", "hub") for p in (False, True))],
)
def test_every_format_yields_its_documents(
    format: str, prompted: bool, corpus: Path, tmp_path: Path
) -> None:
    # The datasets library also loads a local folder by its path.
    path = corpus / ("parquet" if format == "hub" else format)
    prompt = "prompt" if prompted else None
    source = SourceConfig(format=format, path=str(path), prompt=prompt)  # type: ignore[arg-type]
    summary = tokenise(source, tmp_path / "out.v1", "bytes")
    texts = [TEXTS[i] for i in (0, 2, 3, 1)] if format == "text" else TEXTS
    tokens, mask = expected(texts, PROMPTS if prompted else None)
    written = read_indexed(tmp_path / "out.v1")
    assert written.tokens.tolist() == tokens
    assert written.tokens.dtype == np.uint16
    assert (written.mask is not None) == prompted
    assert written.mask is None or written.mask.tolist() == mask
    assert (summary.documents, summary.tokens) == (4, len(tokens))
    assert len(written.starts) == 4


def test_a_file_and_a_glob_are_sources(corpus: Path) -> None:
    file = SourceConfig(format="jsonl", path=str(corpus / "jsonl" / "b.jsonl"))
    assert [d.text for d in read_documents(file)] == TEXTS[2:]
    glob = SourceConfig(format="jsonl", path=str(corpus / "**" / "*.jsonl"), column="prompt")
    assert [d.text for d in read_documents(glob)] == [p for p in PROMPTS if p]


def test_nulls_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    source = SourceConfig(format="jsonl", path=str(tmp_path / "a.jsonl"))
    assert [d.text for d in read_documents(source)] == ["a", "b"]


def test_the_default_corpus_needs_neither_datasets_nor_tokenizers() -> None:
    program = """
import sys
from colonnade.launcher.data import open_data
from colonnade.launcher.recipe.tables import Recipe
open_data(Recipe()).train.batch([0, 1])
print(sorted({"datasets", "tokenizers", "pyarrow", "pandas"} & set(sys.modules)))
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).split() == ["[]"]


def test_tokenise_overwrites_only_if_asked(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", 5)
    tokenise(source, tmp_path / "new" / "out", "bytes")
    before = (tmp_path / "new" / "out.bin").read_bytes()
    with pytest.raises(UserError, match=r"out\.bin exists: give another destination"):
        tokenise(source, tmp_path / "new" / "out", "bytes")
    assert (tmp_path / "new" / "out.bin").read_bytes() == before
    write_lines(tmp_path / "a.jsonl", 6)
    assert tokenise(source, tmp_path / "new" / "out", "bytes", overwrite=True).documents == 6
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/out: .*give another destination"):
        tokenise(source, tmp_path / "file" / "out", "bytes")
    with pytest.raises(UserError, match="tokenised already"):
        tokenise(SourceConfig(format="tokens", path="x"), tmp_path / "y", "bytes")


def open_error(source: SourceConfig, **options: Any) -> str:
    """Returns the error of opening a source, which is the same indexed and streamed."""
    messages = set()
    for stream in (False, True):
        variant = source.model_copy(update={"stream": stream})
        with pytest.raises(UserError) as caught:
            open_data(recipe(variant, **options)).train.batch([0])
        messages.add(str(caught.value))
    [message] = messages
    return message


@pytest.mark.parametrize("format", ["text", "jsonl", "parquet"])
def test_a_missing_file_is_named(format: str, tmp_path: Path) -> None:
    source = SourceConfig(format=format, path=str(tmp_path / "none*"))  # type: ignore[arg-type]
    message = open_error(source)
    assert "none*': there is no such file or folder, and as a glob it matches none" in message


def test_a_data_set_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    message = open_error(SourceConfig(format="hub", path=str(tmp_path / "none")))
    assert f"cannot read hub '{tmp_path / 'none'}'" in message


@pytest.mark.parametrize(
    ("format", "content", "reason"),
    [
        ("text", b"\xff\xfe\x80", "utf-8"),
        ("jsonl", b'{"text": "a"\n{"te', "JSON"),
        ("parquet", b"PAR1 not", "Parquet"),
    ],
)
def test_an_unreadable_file_is_named(
    format: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["good"]}), table)
    good = {"text": b"good", "jsonl": b'{"text": "good"}\n', "parquet": table.getvalue()}
    (tmp_path / "a").write_bytes(good[format])
    (tmp_path / "b").write_bytes(content)
    source = SourceConfig(format=format, path=str(tmp_path / "[ab]"))  # type: ignore[arg-type]
    message = open_error(source, seq_len=512)
    assert f"cannot read {tmp_path / 'b'}" in message
    assert reason in message


def test_a_missing_column_is_named(corpus: Path) -> None:
    path = str(corpus / "jsonl")
    message = open_error(SourceConfig(format="jsonl", path=path, column="body"))
    assert f"column = 'body', but {path}/a.jsonl, line 1 has the columns 'prompt', " in message
    message = open_error(SourceConfig(format="jsonl", path=path, prompt="question"))
    assert "prompt = 'question', but" in message
    message = open_error(SourceConfig(format="jsonl", path=path, column="number"))
    assert "column = 'number'" in message
    assert "holds a number, not text" in message
    path = str(corpus / "parquet")
    message = open_error(SourceConfig(format="parquet", path=path, column="body"))
    assert f"column = 'body', but {path}/a.parquet has the columns 'prompt', 'text'" in message
    message = open_error(SourceConfig(format="parquet", path=path, column="number"))
    assert f"column = 'number' of {path}/a.parquet holds int64, not text" in message
    message = open_error(SourceConfig(format="hub", path=path, column="body"))
    assert f"column = 'body', but hub '{path}' has the columns 'prompt', 'text'" in message


def test_an_empty_corpus_is_refused_and_not_cached(tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").write_text("")
    assert "is an empty corpus" in open_error(
        SourceConfig(format="text", path=str(tmp_path / "void"))
    )
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    assert "is an empty corpus" in open_error(
        SourceConfig(format="jsonl", path=str(tmp_path / "a.jsonl"))
    )
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", 2)
    with pytest.raises(UserError, match=r"22 tokens, too few for one row of train\.seq_len = 64"):
        open_data(recipe(source, seq_len=64, validation=0.0))


def test_a_vocabulary_below_the_tokenizer_is_a_fault_of_the_recipe(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", 2)
    with pytest.raises(RecipeError, match=r"model\.vocab = 256: .*has 257 tokens"):
        open_data(recipe(source, vocab=256))


def test_token_files_of_another_vocabulary_are_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", 20)
    tokenise(source, tmp_path / "out", "bytes")
    tokens = SourceConfig(format="tokens", path=str(tmp_path / "out"))
    with pytest.raises(RecipeError, match=r"model\.vocab = 200: .*made by 'bytes' of 257 tokens"):
        open_data(recipe(tokens, vocab=200))
    record = tmp_path / "out.record.json"
    record.rename(tmp_path / "moved")
    data = open_data(recipe(tokens, vocab=200))
    with pytest.raises(UserError, match=r"out\.bin holds the token id 256, but model\.vocab = 200"):
        data.train.batch(range(data.train.rows or 0))
    with pytest.raises(UserError, match=r"none\.idx: No such file"):
        open_data(recipe(SourceConfig(format="tokens", path=str(tmp_path / "none"))))
    with pytest.raises(UserError, match="needs a path"):
        open_data(recipe(SourceConfig(format="tokens")))


def test_missing_libraries_name_the_extra(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "a.jsonl", 2)
    (tmp_path / "t.json").write_text("{}")
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for library in ("datasets", "tokenizers", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, library, None)
    open_data(recipe(source)).train.batch([0])  # needs none of them
    hint = "pip install 'colonnade[text]'"
    assert hint in open_error(source, tokenizer=str(tmp_path / "t.json"))
    assert hint in open_error(SourceConfig(format="hub", path="x"))
    assert hint in open_error(SourceConfig(format="parquet", path=str(corpus / "parquet")))
    assert hint in open_error(SourceConfig(format="jsonl", path=str(tmp_path / "a.zst")))


def test_loss_masks_reach_the_labels(corpus: Path) -> None:
    source = SourceConfig(format="jsonl", path=str(corpus / "jsonl"), prompt="prompt")
    rows = open_data(recipe(source, seq_len=8, validation=0.0)).train
    tokens, mask = (np.array(x) for x in expected(TEXTS, PROMPTS))
    starts = np.append(0, np.flatnonzero(tokens == 256)[:-1] + 1)
    assert rows.rows is not None
    offsets = range(0, rows.rows * 8, 8)
    labels = sorted(rows.batch(range(rows.rows)).labels.tolist())
    assert labels == sorted(
        slice_rows(Tokens("", tokens, starts, mask), offsets, 8, 257).labels.tolist()
    )
    assert labels != sorted(slice_rows(Tokens("", tokens, starts), offsets, 8, 257).labels.tolist())


@pytest.mark.parametrize("format", ["jsonl", "tokens"])
def test_all_of_a_validation_source_is_read_in_order(format: str, tmp_path: Path) -> None:
    train, held = (write_lines(tmp_path / f"{name}.jsonl", n) for name, n in (("a", 40), ("b", 9)))
    if format == "tokens":
        tokenise(held, tmp_path / "b", "bytes")
        held = SourceConfig(format="tokens", path=str(tmp_path / "b"))
    data = open_data(recipe(train, validation_sources=(held,)))
    alone = open_data(recipe(train, validation=0.0))
    assert data.train.rows == alone.train.rows
    assert torch.equal(data.train.batch([0, 1]).tokens, alone.train.batch([0, 1]).tokens)
    assert data.validation is not None
    rows = data.validation.rows or 0
    tokens, _ = expected([f"document {i}" for i in range(9)])
    assert rows == (len(tokens) - 1) // 8
    assert data.validation.batch(range(rows)).tokens.flatten().tolist() == tokens[: rows * 8]


def test_faults_of_a_validation_source_name_it(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", 40)
    short = SourceConfig(format="text", path=str(tmp_path / "b.txt"))
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(UserError, match=r"b\.txt.* has 6 tokens, too few for one row"):
        open_data(recipe(train, validation_sources=(short,)))
    assert "b.txt" in "".join(check_data(recipe(train, validation_sources=(short,))))
    none = SourceConfig(format="text", path=str(tmp_path / "none"))
    with pytest.raises(UserError, match="none"):
        open_data(recipe(train, validation_sources=(none,)))


def test_another_order_reads_the_same_rows_otherwise(tmp_path: Path) -> None:
    config = recipe(write_lines(tmp_path / "a.jsonl", 40), validation=0.0)
    first, other = (open_data(config, order).train for order in (0, 1))
    rows = first.rows or 0
    both = [r.batch(range(rows)).tokens.tolist() for r in (first, other)]
    assert both[0] != both[1]
    assert sorted(both[0]) == sorted(both[1])
