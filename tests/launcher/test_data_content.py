"""What a run reads is known by content: changes of equal length are named when it resumes."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_sources import recipe, write_lines
from test_data_tokenizer import train as train_tokenizer

from colonnade.launcher.data import IndexedWriter, content, data, open_data, read_indexed
from colonnade.launcher.data.content import read_contents
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe, SourceConfig

pytestmark = pytest.mark.usefixtures("temporary_caches")

PARTS = {".bin": "tokens", ".idx": "documents", ".mask": "loss masks"}


def change_byte(path: Path, offset: int) -> None:
    """Flips the lowest bit of a byte, and restores the time of modification."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns


def saved_state(recipe: Recipe, batches: int = 0) -> dict[str, Any]:
    """Returns the state of a run, as its checkpoint holds it, after `batches` of 4 rows."""
    rows = open_data(recipe).train
    for number in range(batches):
        rows.batch(range(4 * number, 4 * number + 4))
    return json.loads(json.dumps(rows.state()))


def refusal(recipe: Recipe, state: dict[str, Any]) -> str:
    """Returns the message with which a run is not resumed."""
    with pytest.raises(UserError) as caught:
        open_data(recipe).train.load_state(state)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_tokens(prefix: Path, documents: int = 40) -> Recipe:
    """Writes a token file with a loss mask and without a record; each document is 10 tokens."""
    with IndexedWriter(prefix, np.dtype("<u2"), masked=True) as writer:
        for number in range(documents):
            writer.add(np.arange(10) + number, np.arange(10) % 2)
    return recipe(SourceConfig(format="tokens", path=str(prefix)))


def byte_to_change(path: Path) -> int:
    """Returns the offset of a byte whose change leaves a token file consistent."""
    # The bound of the third of 40 documents: 2 becomes 3.
    return 34 + 12 * 40 + 8 * 2 if path.suffix == ".idx" else 21


@pytest.mark.parametrize("ending", list(PARTS))
def test_a_token_file_without_a_record(ending: str, tmp_path: Path) -> None:
    run = write_tokens(tmp_path / "out")
    state = saved_state(run)
    file = Path(f"{tmp_path / 'out'}{ending}")
    change_byte(file, byte_to_change(file))
    assert refusal(run, state) == (
        f"{tmp_path / 'out.bin'} holds other {PARTS[ending]} than when the run was saved: restore "
        "the data and data.tokenizer (their paths do not matter), or start a new run"
    )
    change_byte(file, byte_to_change(file))
    open_data(run).train.load_state(state)
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("out.*"):
        path.rename(tmp_path / "moved" / f"in{path.suffix}")
    moved = recipe(SourceConfig(format="tokens", path=str(tmp_path / "moved" / "in")))
    open_data(moved).train.load_state(state)


@pytest.mark.parametrize("ending", list(PARTS))
def test_a_token_file_that_does_not_match_its_record(ending: str, tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "text {i}", "prompt": "p"}}\n' for i in range(10, 50))
    (tmp_path / "a.jsonl").write_text(lines)
    data(str(tmp_path / "a.jsonl"), tmp_path / "out", prompt="prompt")
    run = recipe(SourceConfig(format="tokens", path=str(tmp_path / "out")))
    open_data(run)
    file = Path(f"{tmp_path / 'out'}{ending}")
    change_byte(file, byte_to_change(file))
    with pytest.raises(UserError) as caught:
        open_data(run)
    assert str(caught.value) == (
        f"{tmp_path / 'out'}.bin, .idx or .mask has changed since out.record.json was written "
        "beside it: copy the files again, write them with `colonnade data`, or, if the change is "
        "intended, remove the record"
    )
    read_indexed(tmp_path / "out")  # without being asked to verify
    (tmp_path / "out.record.json").unlink()
    open_data(run)


def test_a_large_token_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_WHOLE_BYTES", 5000)
    monkeypatch.setattr(content, "_BLOCK_BYTES", 16)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 5000 + '"}\n')
    data(str(tmp_path / "a.jsonl"), tmp_path / "out")
    run = recipe(SourceConfig(format="tokens", path=str(tmp_path / "out")))
    state = saved_state(run)
    size = (tmp_path / "out.bin").stat().st_size
    change_byte(tmp_path / "out.bin", 20)  # between samples
    open_data(run).train.load_state(state)
    change_byte(tmp_path / "out.bin", size - 4)  # the last sample
    with pytest.raises(UserError, match=r"has changed since out\.record\.json"):
        open_data(run)
    (tmp_path / "out.record.json").unlink()
    assert "out.bin holds other tokens than when" in refusal(run, state)
    masked = write_tokens(tmp_path / "masked", 400)
    state = saved_state(masked)
    change_byte(tmp_path / "masked.mask", 3999)
    assert "masked.bin holds other loss masks than when" in refusal(masked, state)


def stream_of(folder: Path, **options: Any) -> Recipe:
    """Writes three files of 300 documents, and returns a recipe that streams them."""
    for name in "abc":
        write_lines(folder / f"{name}.jsonl", 300)
    return recipe(SourceConfig(path=str(folder / "*.jsonl"), stream=True), **options)


@pytest.mark.parametrize("file", ["a", "b", "c"])
@pytest.mark.parametrize(
    ("batches", "reading"), [(0, None), (120, 0), (240, 1), (350, 2), (400, None)]
)
def test_a_stream_whose_files_changed(
    file: str, batches: int, reading: int | None, tmp_path: Path
) -> None:
    run = stream_of(tmp_path)
    state = saved_state(run, batches)
    # None at the start of a pass, of which the last of these is the second one.
    assert (state["stream"] or {"file": None})["file"] == reading
    open_data(run).train.load_state(state)
    change_byte(tmp_path / f"{file}.jsonl", 12)
    assert refusal(run, state) == (
        f"data.sources: '{tmp_path}/*.jsonl' is no longer what the run read when it was saved "
        f"({file}.jsonl has other content of the same 7390 bytes): restore the data, or start a "
        "new run"
    )
    del state["files"]  # as states were that did not hold the files
    open_data(run).train.load_state(state)


def test_a_stream_whose_files_were_added_or_cut(tmp_path: Path) -> None:
    run = stream_of(tmp_path)
    state = saved_state(run, 1)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tmp_path.glob("*.jsonl"):
        shutil.copy(file, moved)
    elsewhere = recipe(SourceConfig(path=str(moved), stream=True))
    open_data(elsewhere).train.load_state(state)
    (moved / "b.jsonl").rename(moved / "bb.jsonl")
    assert "(b.jsonl then, bb.jsonl now)" in refusal(elsewhere, state)
    write_lines(tmp_path / "c.jsonl", 299)
    assert "(c.jsonl had 7390 bytes then, 7365 now)" in refusal(run, state)
    write_lines(tmp_path / "a.jsonl", 299)
    assert "(a.jsonl had 7390 bytes then, 7365 now, and 1 more changed)" in refusal(run, state)
    write_lines(tmp_path / "d.jsonl", 1)
    assert "(3 files then, 4 now)" in refusal(run, state)


def test_a_local_folder_read_as_a_data_set_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "a.jsonl", 100)
    run = recipe(SourceConfig(format="hub", path=str(tmp_path / "set"), stream=True))
    state = saved_state(run, 1)
    open_data(run).train.load_state(state)
    change_byte(tmp_path / "set" / "a.jsonl", 12)
    assert "(a.jsonl has other content of the same" in refusal(run, state)


def test_another_tokenizer_at_the_same_path(tmp_path: Path) -> None:
    file = train_tokenizer(tmp_path / "t.json", True, ("<|endoftext|>", "</s>"))
    options: dict[str, Any] = {"vocab": 512, "tokenizer": str(file)}
    streamed = stream_of(tmp_path, **options)
    cached = recipe(SourceConfig(path=str(tmp_path / "a.jsonl")), **options)
    data(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=str(file))
    tokens = recipe(SourceConfig(format="tokens", path=str(tmp_path / "out")), **options)
    states = [saved_state(run, 2) for run in (streamed, cached, tokens)]
    eod = streamed.model_copy(update={"data": streamed.data.model_copy(update={"eod": "</s>"})})
    assert (
        f"data.eod of data.tokenizer = '{file}' differs from that of the one that read "
        f"'{tmp_path}/*.jsonl' when the run was saved (eod 0 then, 1 now): restore it"
    ) in refusal(eod, states[0])
    # The same tokens by a tokenizer of other content, and of equal length.
    text = file.read_text()
    assert '"ignore_merges": false' in text
    file.write_text(text.replace('"ignore_merges": false', '"ignore_merges":false '))
    assert refusal(streamed, states[0]) == (
        f"data.tokenizer = '{file}' has other content than the one that read '{tmp_path}/*.jsonl' "
        "when the run was saved: restore it (its path does not matter), or start a new run"
    )
    assert refusal(cached, states[1]) == (
        f"'{tmp_path}/a.jsonl' was tokenised by another tokenizer when the run was saved, now by "
        f"'{file}': restore data.tokenizer (its path does not matter), or start a new run"
    )
    assert "out.bin was made by another tokenizer" in refusal(tokens, states[2])
    del states[1]["tokenizer"]  # as states were that did not hold it
    open_data(cached).train.load_state(states[1])


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Returns a list to which every file that is hashed is added; hashes of all are remembered."""
    hashed: list[Path] = []
    hash_file = content._hash_file

    def counted(path: Path, size: int, whole: bool) -> str:
        hashed.append(path)
        return hash_file(path, size, whole)

    monkeypatch.setattr(content, "_hash_file", counted)
    monkeypatch.setattr(content, "_REMEMBERED_BYTES", 0)
    return hashed


def test_unchanged_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = count_hashing(monkeypatch)
    run = stream_of(tmp_path)
    state = saved_state(run, 3)
    assert sorted(path.name for path in hashed) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    open_data(run).train.load_state(state)
    assert len(hashed) == 3
    os.utime(tmp_path / "a.jsonl", ns=(0, 0))  # equal content: hashed again and accepted
    open_data(run).train.load_state(state)
    assert len(hashed) == 6
    change_byte(tmp_path / "a.jsonl", 12)
    assert "a.jsonl has other content" in refusal(run, state)
    # Unreadable memos are ignored, and a folder that cannot be written costs hashing only.
    change_byte(tmp_path / "a.jsonl", 12)
    folder = Path(os.environ["XDG_CACHE_HOME"], "colonnade", "contents")
    open_data(run)
    for text in ("", "[]", "[1, 2, 3]", '[["a", 1, 2]]', '[["a", 1, "x"], [], []]'):
        for memo in folder.iterdir():
            memo.write_text(text)
        open_data(run).train.load_state(state)
    shutil.rmtree(folder)
    folder.write_text("no folder")
    open_data(run).train.load_state(state)


def test_a_file_that_was_just_written_is_hashed_when_the_clock_has_advanced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_hashing(monkeypatch)
    slept: list[float] = []
    monkeypatch.setattr(content.time, "sleep", slept.append)
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(bytes(10))
    threading.Event().wait(0.1)
    read_contents([old])
    assert slept == []
    new.write_bytes(bytes(10))
    read_contents([old, new])
    assert slept == [content._CLOCK_TICK]


def test_processes_may_hash_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = count_hashing(monkeypatch)
    file = tmp_path / "a"
    file.write_bytes(bytes(1000))
    time.sleep(0.05)
    barrier, found = threading.Barrier(4), []

    def read() -> None:
        barrier.wait(30)
        found.append(read_contents([file])[0].hash)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4
    assert len(set(found)) == 1
    count = len(hashed)
    read_contents([file])
    assert len(hashed) == count
    folder = Path(os.environ["XDG_CACHE_HOME"], "colonnade", "contents")
    assert len(list(folder.iterdir())) == 1  # and no temporary file
