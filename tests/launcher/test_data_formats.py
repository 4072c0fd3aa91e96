"""Formats: endings and compressions, texts of any characters, resuming, errors by line."""

import bz2
import gzip
import itertools
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colonnade.launcher.data import data, read_indexed
from colonnade.launcher.data.documents import Document
from colonnade.launcher.data.files import resolve_format
from colonnade.launcher.data.readers import FileReader
from colonnade.launcher.data.sources import read_documents
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

Write = Callable[[Path, list[dict[str, Any]]], None]


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path: Path | str, **fields: Any) -> list[str]:
    return [d.text for d in read_documents(SourceConfig(path=str(path), **fields))]


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **fields)
    return str(caught.value)


ROWS = [{"text": "alpha"}, {"text": "beta"}]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".JSONL", ".v1.jsonl", ""])
def test_json_lines_by_any_ending(ending: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus{ending}{compression.upper() if ending.isupper() else compression}"
    path.write_bytes(COMPRESSIONS[compression](as_lines(ROWS)))
    assert read(path) == ["alpha", "beta"]
    renamed = tmp_path / "renamed"  # compression is detected from the content
    path.rename(renamed)
    assert read(renamed, format="jsonl") == ["alpha", "beta"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_text_may_be_compressed(compression: str, tmp_path: Path) -> None:
    content = COMPRESSIONS[compression](b'{"text": "x"}\n') * (2 if compression else 1)
    (tmp_path / f"a.txt{compression}").write_bytes(content)
    assert read(tmp_path) == ['{"text": "x"}\n' * (2 if compression else 1)]


@pytest.mark.parametrize("name", ["a.parquet", "a.PQ", "part-00000"])
def test_parquet_by_any_ending(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
    assert read(tmp_path / name) == read(tmp_path) == ["alpha", "beta"]


def test_a_folder_has_the_format_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS[:1])))
    (tmp_path / "deep" / "b.ndjson").write_bytes(as_lines(ROWS[1:]))
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "empty.parquet").write_text("")
    assert read(tmp_path) == ["alpha", "beta"]
    (tmp_path / "README.md").write_text("no")
    message = refusal(tmp_path)
    assert (
        "several formats (2 of jsonl, such as a.jsonl.gz; 1 of text, such as README.md" in message
    )
    assert "set `format`" in message
    assert read(tmp_path, format="jsonl") == ["alpha", "beta"]
    assert read(tmp_path / "**" / "*.*n*") == ["alpha", "beta"]


def test_a_file_of_an_unsupported_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\nx\n"))
    assert "a.csv.gz ends in .csv, which is not read" in refusal(tmp_path)
    assert read(tmp_path, format="text") == ["text\nx\n"]
    (tmp_path / "b").write_bytes(b"PK\x03\x04 and so on")
    assert "b is a zip archive: unpack it" in refusal(tmp_path / "b")
    (tmp_path / "c.txt").write_bytes("Ä".encode("utf-16"))
    assert "c.txt: byte 0 is not utf-8 text" in refusal(tmp_path / "c.txt")
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(as_lines(ROWS))[:-9])
    assert f"cannot read {tmp_path / 'd.jsonl.xz'}" in refusal(tmp_path / "d.jsonl.xz")
    (tmp_path / "tokens.bin").touch()
    (tmp_path / "tokens.idx").touch()
    assert "set `format` to tokens" in refusal(tmp_path / "tokens")


OTHERS: list[list[dict[str, Any]]] = [
    [{}, {"meta": 1}],
    [{"meta": None}, {"meta": {"x": 1}}],
    [{"meta": 1}, {"meta": "s-1"}],
    [{"meta": []}, {"meta": ["t"]}],
    [{"meta": 1}, {"meta": 1.5}],
    [{"meta": "2024-01-01"}, {"meta": "soon"}],
    [{"meta": 10**60}, {"meta": [[{}]]}],
]


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("files", [1, 2])
def test_other_columns_are_ignored(
    others: list[dict[str, Any]], files: int, tmp_path: Path
) -> None:
    rows = [{**other, **row} for other, row in zip(others, ROWS, strict=True)]
    for number in range(files):
        file_rows = rows if files == 1 else rows[number : number + 1]
        (tmp_path / f"{number}.jsonl").write_bytes(as_lines(file_rows))
    assert read(tmp_path) == ["alpha", "beta"]


def test_other_columns_of_parquet_may_differ(tmp_path: Path) -> None:
    columns: list[dict[str, Any]] = [{}, {"m": [1]}, {"m": ["s"]}, {"m": [None]}, {"m": [{"a": 1}]}]
    for number, other in enumerate(columns):
        pq.write_table(pa.table({"text": [str(number)], **other}), tmp_path / f"{number}.parquet")
    # A file without rows needs no text column, and nulls are skipped.
    pq.write_table(pa.table({"other": pa.array([], pa.int64())}), tmp_path / "5.parquet")
    pq.write_table(pa.table({"text": [None, None]}), tmp_path / "6.parquet")
    assert read(tmp_path) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), "str")])
def test_text_in_parquet_has_several_types(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"], kind)}), tmp_path / "a.parquet")
    assert read(tmp_path) == ["a", "b"]


def test_a_parquet_column_of_dates_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([1], pa.timestamp("s"))}), tmp_path / "a.parquet")
    assert "holds timestamp[ms], not text" in refusal(tmp_path)


def test_texts_that_look_like_other_types_are_unchanged(tmp_path: Path) -> None:
    texts = ["2024-01-01", "2024-01-01T00:00:00Z", "1", "1.50", "null", "true", "[]", "12:00"]
    (tmp_path / "a.jsonl").write_bytes(as_lines([{"text": text} for text in texts]))
    assert read(tmp_path) == texts
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts], indent=2))
    assert read(tmp_path / "b.json") == texts


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("5", "holds a number, not text"),
        ("9" * 5000, "holds a number, not text"),
        ("1.5", "holds a number, not text"),
        ("true", "holds a boolean, not text"),
        ('["a"]', "holds a list, not text"),
        ("{}", "holds an object, not text"),
        (r'"\ud83d"', "holds half a surrogate pair"),
        ('"a', "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
    ],
)
def test_values_that_are_not_text_are_refused_by_line(
    value: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{{"text": {value}}}\n')
    message = refusal(path)
    assert f"{path}, line 3" in message
    assert reason in message


@pytest.mark.parametrize(
    ("line", "reason"), [(b'{"body": "a"}', "has the columns 'body'"), (b"3", "no JSON object")]
)
def test_lines_without_the_column_are_refused(line: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line)
    assert "a.jsonl, line 2" in (message := refusal(tmp_path))
    assert reason in message
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n"\xff"')
    assert "line 2: byte 1 of it is not utf-8 text" in refusal(tmp_path)


def test_line_ends_are_kept_and_byte_order_marks_removed(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(bom + b"one\r\ntwo\rthree\n" + bom)
    data(str(tmp_path / "a.txt"), tmp_path / "out")
    tokens = read_indexed(tmp_path / "out").tokens.tolist()
    assert bytes(tokens[:-1]) == b"one\r\ntwo\rthree\n" + bom
    text = "\ufeffa\r\nb\r"
    (tmp_path / "a.jsonl").write_bytes(bom + as_lines([{"text": text}]).replace(b"\n", b"\r\n"))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    for name, kind in (("a.jsonl", None), ("a.parquet", None), ("a.parquet", "hub")):
        path = tmp_path / ("hub" if kind else name)
        if kind:
            path.mkdir()
            (tmp_path / name).rename(path / name)
        assert read(path, format=kind or "auto") == ["a\r\nb\r"]


def write_text(folder: Path, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        (folder / f"{number:03}.txt").write_bytes(row["text"].encode())


def write_lines(folder: Path, rows: list[dict[str, Any]], ascii: bool = True) -> None:
    half = len(rows) // 2
    for number, file_rows in enumerate((rows[:half], rows[half:])):
        text = "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in file_rows)
        (folder / f"{number}.jsonl").write_bytes(text.encode())


def write_array(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "a.json").write_text(json.dumps(rows))


def write_gzip(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(rows)))


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    half = len(rows) // 2
    for number, file_rows in enumerate((rows[:half], rows[half:])):
        table = pa.table({"text": pa.array([row["text"] for row in file_rows], pa.string())})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=7)


WRITERS: list[Write] = [
    write_text,
    write_lines,
    lambda folder, rows: write_lines(folder, rows, ascii=False),
    write_array,
    write_gzip,
    write_parquet,
]
folder_numbers = itertools.count()


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=8), writer=st.sampled_from(WRITERS)
)
def test_texts_of_any_characters_are_read_as_written(
    tmp_path: Path, texts: list[str], writer: Write
) -> None:
    folder = tmp_path / str(next(folder_numbers))
    folder.mkdir()
    writer(folder, [{"text": text} for text in ["x", *texts]])
    assert read(folder) == [t for t in ("x", *(t.removeprefix("\ufeff") for t in texts)) if t]


@pytest.mark.parametrize("writer", WRITERS)
def test_reading_resumes_from_any_position(writer: Write, tmp_path: Path) -> None:
    g = random.Random(0)
    texts = ["".join(g.choices("aé漢\n", k=g.randrange(12))) for _ in range(60)]
    writer(tmp_path, [{"text": text} for text in texts])
    source = SourceConfig(path=str(tmp_path))
    reader = FileReader(source)
    documents: list[Document] = []
    positions = []
    progress = []
    for document in reader.documents():
        documents.append(document)
        positions.append(json.loads(json.dumps(reader.position())))
        progress.append(reader.progress())
    assert [d.text for d in documents] == [t for t in texts if t]
    assert progress == sorted(progress)
    assert 0 < progress[0] <= progress[-1] <= 1
    for count, position in enumerate(positions, start=1):
        resumed = FileReader(source)
        assert [d.text for d in resumed.documents(position)] == [d.text for d in documents[count:]]
        assert resumed.position() == reader.position()


def test_a_position_in_other_files_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path, ROWS)
    source = SourceConfig(path=str(tmp_path))
    reader = FileReader(source)
    next(reader.documents())
    position = reader.position()
    (tmp_path / "0.jsonl").write_bytes(as_lines([{"text": "other length"}]))
    with pytest.raises(UserError, match=r"no longer what the run read .*0\.jsonl of \d+ bytes"):
        next(FileReader(source).documents(position))
    write_lines(tmp_path, ROWS)
    assert next(FileReader(source).documents(position)).text == "beta"
    (tmp_path / "2.jsonl").write_bytes(as_lines(ROWS))
    with pytest.raises(UserError, match=r"restore the data, or start a new run"):
        next(FileReader(source).documents(position))
    with pytest.raises(UserError, match="no longer what the run read"):
        next(FileReader(source).documents({"shard_idx": 0}))


def test_resolve_format_detects_the_format_of_auto_only(tmp_path: Path) -> None:
    write_lines(tmp_path, ROWS)
    assert resolve_format(SourceConfig(path=str(tmp_path))).format == "jsonl"
    assert resolve_format(SourceConfig()).format == SourceConfig().format == "stdlib"
    assert SourceConfig(path="x").format == "auto"
    assert resolve_format(SourceConfig(format="text", path=str(tmp_path))).format == "text"
