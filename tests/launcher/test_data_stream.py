"""Streams yield the rows of indexed data, in stream order, and resume; prefetching."""

import json
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colonnade.launcher.data import Prefetcher, open_data, read_indexed, tokenise
from colonnade.launcher.data.rows import Batch, IndexedRows, MixtureRows, Tokens, slice_rows
from colonnade.launcher.data.stream import StreamRows
from colonnade.launcher.data.tokenizer import open_tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig

S = 32


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    """Three files with 900 documents in all, of lengths from zero to several rows."""
    g = random.Random(0)
    for name in "abc":
        rows = [
            {
                "text": "".join(g.choices("abcdé", k=int(g.expovariate(1 / 20)))),
                "prompt": "?" * (i % 3),
            }
            for i in range(300)
        ]
        rows[7]["text"] = "long " * 50
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(format="jsonl", path=str(tmp_path / "*.jsonl"), prompt="prompt")


def stream(source: SourceConfig) -> StreamRows:
    return StreamRows(source, open_tokenizer("bytes"), S, 257)


def repeated_passes(source: SourceConfig, prefix: Path, count: int) -> Tokens:
    """Concatenates `count` passes over the source."""
    tokenise(source, prefix, "bytes")
    single = read_indexed(prefix)
    assert single.mask is not None
    starts = [single.starts + i * len(single.tokens) for i in range(count)]
    return Tokens(
        "", np.tile(single.tokens, count), np.concatenate(starts), np.tile(single.mask, count)
    )


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rows_equal_those_of_the_indexed_file(source: SourceConfig, tmp_path: Path) -> None:
    tokens = repeated_passes(source, tmp_path / "out", 3)
    n = (len(tokens.tokens) - 1) // S
    expected = slice_rows(tokens, range(0, n * S, S), S, 257)
    rows = stream(source)
    read = [rows.batch(range(k, min(k + 7, n))) for k in range(0, n, 7)]
    assert equal(Batch(*(torch.cat(field) for field in zip(*read, strict=True))), expected)
    # Ranks skip the rows of other ranks: a few rows, and more than a pass.
    for step in (3, n // 2 - 1):
        rows = stream(source)
        for k in range(1, n, step):
            assert equal(rows.batch([k]), Batch(*(field[k : k + 1] for field in expected)))


def test_any_state_resumes_exactly(source: SourceConfig) -> None:
    rows = stream(source)
    states = [rows.state()]
    batches = []
    for k in range(0, 2400, 60):  # over the end of a pass, at 1054 rows
        batches.append(rows.batch([k, k + 1, k + 5]))
        states.append(json.loads(json.dumps(rows.state())))
    for i in (0, 1, 9, 17, 18, 25, 39):
        resumed = stream(source)
        for _ in range(2):  # a state may be loaded several times
            resumed.load_state(states[i])
            assert resumed.state() == states[i]
            reread = [resumed.batch([k, k + 1, k + 5]) for k in range(i * 60, 2400, 60)]
            assert all(equal(a, b) for a, b in zip(reread, batches[i:], strict=True))


def test_the_state_of_any_rank_resumes_every_rank(source: SourceConfig) -> None:
    expected = stream(source).batch(range(40, 48))
    ranks = [stream(source) for _ in range(2)]
    for rank, rows in enumerate(ranks):
        rows.batch(range(rank * 20, rank * 20 + 20))
    for saved in ranks:
        resumed = stream(source)
        resumed.load_state(saved.state())
        assert equal(resumed.batch(range(40, 48)), expected)


def test_skipped_rows_are_not_buffered(source: SourceConfig) -> None:
    rows = stream(source)
    buffered = []

    def count_buffered(chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            buffered.append(len(rows._chunks))
            yield chunk

    rows._chunk_iterator = count_buffered(rows._chunk_iterator)
    rows.batch([5000])
    assert len(buffered) > 10
    assert max(buffered) <= 1


def test_a_stream_does_not_go_back(source: SourceConfig) -> None:
    rows = stream(source)
    rows.batch([5])
    with pytest.raises(ValueError, match="row 5 of a stream that is at row 6"):
        rows.batch([5])


def test_a_mixture_of_a_stream_and_a_file_resumes(source: SourceConfig, tmp_path: Path) -> None:
    streamed = source.model_copy(update={"stream": True, "weight": 2.0})
    recipe = Recipe(
        data=DataConfig(sources=(source, streamed), cache=str(tmp_path / "cache"), validation=0.0),
        train=TrainConfig(seq_len=S),
    )
    rows = open_data(recipe).train
    assert isinstance(rows, MixtureRows)
    rows.batch(range(30))
    state = json.loads(json.dumps(rows.state()))
    resumed = open_data(recipe).train
    resumed.load_state(state)
    assert equal(resumed.batch(range(30, 60)), rows.batch(range(30, 60)))
    assert "stream" in rows.describe()


def test_a_row_may_span_many_passes(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(str(i) * 3)
    rows = stream(SourceConfig(format="text", path=str(tmp_path)))
    one_pass = "".join(f"{i}{i}{i}|" for i in range(5))
    tokens = rows.batch([0, 1, 7]).tokens.tolist()
    text = ["".join(chr(t) if t < 256 else "|" for t in row) for row in tokens]
    assert text == [(one_pass * 20)[k * S : k * S + S] for k in (0, 1, 7)]


class GatedRows:
    """Rows whose reads wait for `gate` and are counted; the read of sample `fail_at` fails."""

    rows = None

    def __init__(self, fail_at: int = -1) -> None:
        self.read: list[int] = []
        self.fail_at = fail_at
        self.started = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def batch(self, samples: Sequence[int]) -> Batch:
        self.started.release()
        assert self.gate.acquire(timeout=30)
        if samples[0] == self.fail_at:
            raise UserError("no more")
        self.read += samples
        return Batch(*(torch.tensor([samples]) for _ in range(4)))

    def state(self) -> dict[str, Any]:
        return {"read": len(self.read)}

    def load_state(self, state: dict[str, Any]) -> None:
        raise AssertionError

    def describe(self) -> str:
        return ""


def test_the_prefetcher_reads_ahead_and_its_state_is_that_of_the_last_returned_batch() -> None:
    rows = GatedRows()
    plan = iter([[0, 1], [2], [3, 4, 5]])
    with closing(Prefetcher(rows, plan)) as batches:
        assert batches.state() == {"read": 0}
        assert rows.started.acquire(timeout=30)  # reading starts before `next`
        rows.gate.release(2)
        assert next(batches).tokens.tolist() == [[0, 1]]
        assert rows.started.acquire(timeout=30)
        while len(rows.read) < 3:  # until the second batch is read
            threading.Event().wait(0.001)
        assert batches.state() == {"read": 2}  # it is not returned yet
        rows.gate.release()
        assert [batch.tokens.tolist() for batch in batches] == [[[2]], [[3, 4, 5]]]
        assert batches.state() == {"read": 6}
        with pytest.raises(StopIteration):
            next(batches)


def test_an_error_of_the_thread_is_raised_at_its_batch() -> None:
    rows = GatedRows(fail_at=1)
    rows.gate.release(10)
    with closing(Prefetcher(rows, iter([[0], [1], [2]]))) as batches:
        next(batches)
        with pytest.raises(UserError, match="no more"):
            next(batches)
        assert batches.state() == {"read": 1}
        with pytest.raises(StopIteration):
            next(batches)


def test_upcoming_error_returns_an_error_before_its_batch_is_reached() -> None:
    rows = GatedRows(fail_at=2)
    rows.gate.release(10)
    with closing(Prefetcher(rows, iter([[0], [1], [2], [3]]))) as batches:
        assert batches.upcoming_error(1) is None
        assert batches.upcoming_error(2) is None
        assert next(batches).tokens.tolist() == [[0]]
        assert str(batches.upcoming_error(2)) == "no more"
        assert next(batches).tokens.tolist() == [[1]]
        assert batches.state() == {"read": 2}
        with pytest.raises(UserError, match="no more"):
            next(batches)
        assert batches.upcoming_error(1) is None  # the iteration has ended


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    rows = GatedRows()
    batches = Prefetcher(rows, iter([[k] for k in range(100)]))
    assert threading.active_count() == before + 1
    rows.gate.release(1)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    assert rows.read == [0]
    assert list(batches) == []


def test_prefetched_batches_are_those_of_the_plan(source: SourceConfig, tmp_path: Path) -> None:
    tokens = repeated_passes(source, tmp_path / "out", 1)
    rows = IndexedRows(tokens, S, 257, shuffle=(0, 0))
    plan = [[k, k + 3] for k in range(0, 50, 5)]
    with closing(Prefetcher(rows, iter(plan))) as batches:
        for samples, batch in zip(plan, batches, strict=True):
            assert equal(batch, rows.batch(samples))
