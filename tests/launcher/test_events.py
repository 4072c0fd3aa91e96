"""events.jsonl and goodput: attempts, saves, validations, reasons to stop, torn lines."""

import errno
import io
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, Ranks

from colonnade.launcher.data import IndexedWriter
from colonnade.launcher.data.indexed import token_dtype
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.events import Events, goodput, read_events
from colonnade.launcher.train.lines import Lines, read_lines
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.order import Order
from colonnade.parallel import engine
from colonnade.parallel.world import World

STEPS = 6


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A tiny recipe with overrides: a checkpoint every two steps, a validation every three."""
    generator = torch.Generator().manual_seed(3)
    with IndexedWriter(tmp_path / "tokens", token_dtype(50)) as writer:
        for _ in range(100):
            writer.add(torch.randint(0, 50, (30,), generator=generator).numpy())
    text = f"""
name = "tiny"
[model]
pattern = "*-"
hidden = 16
heads = 2
ffn = 24
vocab = 50
[data]
validation = 0.2
[[data.sources]]
format = "tokens"
path = "{tmp_path / "tokens"}"
[train]
steps = {STEPS}
global_batch = 4
micro_batch = 1
seq_len = 16
precision = "fp64"
validate_rows = 4
validate_every = 3
[checkpoint]
every = 2
"""
    (tmp_path / "tiny.toml").write_text(text)
    return lambda *overrides: load_recipe(tmp_path / "tiny.toml", overrides, None)


def job(
    rank: int,
    size: int,
    recipe: Recipe,
    run: Path,
    resume: bool = False,
    until: int | None = None,
    step: int = 0,
    event: str = "",
) -> str:
    """Runs a job on one rank; returns what it prints.

    In step `step` (from 1) of this attempt something happens: `KILL` kills rank 0, `TERM` sends its
    signal to the last rank; another text is the message of an exception on all ranks, which comes
    after a SIGTERM to all where it is `lost`.
    """
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "recipe.toml").write_text(dump_recipe(recipe))
    norm, steps = engine.gradient_norm, itertools.count(1)

    def gradient_norm(*arguments: Any) -> torch.Tensor:
        if next(steps) == step:
            target = {"KILL": 0, "TERM": size - 1}.get(event, rank)
            if rank == target and event in ("KILL", "TERM", "lost"):
                os.kill(os.getpid(), signal.SIGKILL if event == "KILL" else signal.SIGTERM)
            if event not in ("KILL", "TERM"):
                raise ArithmeticError(event)
        return norm(*arguments)

    engine.gradient_norm = gradient_norm
    try:
        with redirect_stdout(io.StringIO()) as printed:
            run_job(recipe, run, World(rank, size, torch.device("cpu")), resume, Order(until=until))
    except ArithmeticError:
        pass
    finally:
        engine.gradient_norm = norm
    return printed.getvalue()


def told(run: Path) -> list[tuple[Any, ...]]:
    """The events of a run but for `first step`: attempt, event, step, and the reason of a stop."""
    return [
        (e["attempt"], e["event"], e["step"], *([e["reason"]] if "reason" in e else []))
        for e in read_events(run)
        if e["event"] != "first step"
    ]


def test_the_events_of_a_run(ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """On two ranks every event is written once."""
    run = tmp_path / "run"
    printed, nothing = ranks2.run(job, recipe("parallel.tp=2"), run)
    start, first, *others = read_events(run)
    assert (first["event"], first["step"]) == ("first step", 1)
    assert list(first["parts"]) == ["model", "first step"]
    assert min(first["parts"].values()) > 0
    assert told(run)[1:] == [
        (1, "save", 2),
        (1, "validation", 3),
        (1, "save", 4),
        (1, "save", 6),
        (1, "validation", 6),
        (1, "stop", 6, "finished"),
    ]
    facts = {"event": "start", "attempt": 1, "step": 0, "recipe": "tiny", "layout": {"tp": 2}}
    facts |= {"schedule": None, "ranks": 2, "device": "cpu", "torch": str(torch.__version__)}
    assert start.items() >= facts.items()
    assert start["seconds"] > 0
    assert {"host", "colonnade"} < start.keys()
    assert "checkpoint" not in start
    times = [event["time"] for event in read_events(run)]
    assert times == sorted(times)
    validations = [
        r["validation_loss"] for r in read_metrics(run / "metrics.jsonl") if "lr" not in r
    ]
    assert [e["loss"] for e in others if e["event"] == "validation"] == validations
    assert all(e["blocked_seconds"] > 0 for e in others if e["event"] == "save")
    assert "goodput" not in printed  # with one attempt
    assert nothing == ""


def test_the_rows_of_a_run(ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    ranks2.run(job, recipe(), tmp_path)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "lr" in row]
    for row in rows:
        assert row["attempt"] == 1
        assert row["memory_gib"] > 0
        parts, between = row["parts"], {"save", "validation"}
        assert parts.keys() >= {"data", "passes", "update"}
        within = sum(part for name, part in parts.items() if name not in between)
        assert 0 < within <= row["seconds"] + 1e-5
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"], rel=1e-3)
    assert [row["step"] for row in rows if "save" in row["parts"]] == [3, 5]
    assert [row["step"] for row in rows if "validation" in row["parts"]] == [4]
    saves = [e["blocked_seconds"] for e in read_events(tmp_path) if e["event"] == "save"]
    parts = [row["parts"]["save"] for row in rows if "save" in row["parts"]]
    # an event is written at the commit, which may come before training has waited for all
    assert all(0 < saved <= part + 1e-3 for saved, part in zip(saves, parts, strict=False))
    for before, row in itertools.pairwise(rows):  # a step has no time of saves and validations
        between = sum(row["parts"].get(name, 0.0) for name in ("save", "validation"))
        assert row["time"] - before["time"] >= row["seconds"] + between - 0.01


def test_a_killed_and_resumed_run(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """All rows stay, and the run has one curve, that of an uninterrupted run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    with pytest.raises(RankError):
        ranks2.run(job, recipe(), run, False, None, 4, "KILL")
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 17')  # torn by a crash
    ranks2.run(job, recipe(), run, True, None, 4, "numbers\nand more")
    printed = ranks2.run(job, recipe(), run, True)[0]
    ranks2.run(job, recipe(), whole)
    assert told(run) == [
        (1, "start", 0),
        (1, "save", 2),
        (1, "validation", 3),
        (2, "restart", 2),
        (2, "validation", 3),
        (2, "save", 4),
        (2, "stop", 5, "error"),
        (3, "restart", 4),
        (3, "save", 6),
        (3, "validation", 6),
        (3, "stop", 6, "finished"),
    ]
    by_name = [e for e in read_events(run) if e["event"] in ("restart", "stop")]
    assert [e.get("checkpoint") for e in by_name if e["event"] == "restart"] == [
        "step-00000002", "step-00000004"
    ]  # fmt: skip
    assert [e["message"] for e in by_name if "message" in e] == ["numbers"]
    rows = read_metrics(run / "metrics.jsonl", superseded=True)
    steps = [(row["attempt"], row["step"]) for row in rows]
    first = [(1, 1), (1, 2), (1, 3), (1, 3)]
    assert steps == [*first, (2, 3), (2, 3), (2, 4), (2, 5), (3, 5), (3, 6), (3, 6)]

    def course(folder: Path) -> list[tuple[int, float]]:
        current = read_metrics(folder / "metrics.jsonl")
        return [(row["step"], row.get("loss", row.get("validation_loss"))) for row in current]

    assert course(run) == course(whole)
    spent = goodput(read_events(run), rows)
    assert spent is not None
    repeated = [
        r["seconds"] for r in rows if (r["attempt"], r["step"]) in ((1, 3), (2, 5)) and "lr" in r
    ]
    assert spent.lost == pytest.approx(sum(repeated))
    assert min(spent.steps, spent.saves, spent.validation, spent.start_up, spent.stopped) > 0
    assert spent.other > -0.01
    assert f"goodput     {spent.describe()}\n" in printed


def test_reasons_to_stop(ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """A signal on the other rank is recorded, too; a stop at a step that has passed is one."""
    ranks2.run(job, recipe(), tmp_path, False, 1)
    ranks2.run(job, recipe(), tmp_path, True, None, 1, "TERM")
    ranks2.run(job, recipe(), tmp_path, True, 2)
    ranks2.run(job, recipe(), tmp_path, True)
    ranks2.run(job, recipe(), tmp_path, True)  # only validates
    stops = [event for event in told(tmp_path) if event[1] == "stop"]
    assert stops == [
        (1, "stop", 1, "until"),
        (2, "stop", 2, "SIGTERM"),
        (3, "stop", 2, "until"),
        (4, "stop", 6, "finished"),
        (5, "stop", 6, "finished"),
    ]


def test_a_rank_that_lost_its_peer_says_so(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A rank that fails after a signal ends by the signal, but first records the failure."""
    with pytest.raises(RankError, match="exit code -15"):
        ranks2.run(job, recipe(), tmp_path, False, None, 2, "lost")
    assert told(tmp_path) == [(1, "start", 0), (1, "stop", 1, "error")]
    assert read_events(tmp_path)[-1]["message"] == "lost"


def failing_job(rank: int, size: int, recipe: Recipe, run: Path) -> str:
    """Resumes a job; returns the message of its UserError."""
    with pytest.raises(UserError) as error:
        job(rank, size, recipe, run, True)
    return str(error.value)


def test_an_error_before_training_is_recorded(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """It is an attempt of its own, so that no number is given twice."""
    message = ranks2.run(failing_job, recipe(), tmp_path)[0]
    assert "no complete checkpoint" in message
    (event,) = read_events(tmp_path)
    assert (event["event"], event["reason"], event["attempt"]) == ("stop", "error", 1)
    assert event["message"] == message
    ranks2.run(job, recipe(), tmp_path, False, 1)
    assert told(tmp_path)[1] == (2, "start", 0)


def test_a_run_of_an_older_version_goes_on_as_the_second_attempt(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    events = Events()
    events.add("save", 1)  # not open: nothing is written
    events.open(tmp_path)
    assert events.attempt == 2
    events.close()
    assert read_events(tmp_path) == []


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    events = Events()
    events.open(tmp_path)
    events.validation(3, float("nan"), 1.0)
    events.save(3, 0.5, size=7)
    events.close()
    events.save(3, 0.5)  # closed: nothing is written
    assert [e.get("loss", e.get("bytes")) for e in read_events(tmp_path)] == [None, 7]


def test_torn_lines_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xc3')
    assert read_lines(path) == [{"a": 1}]
    for value in (2, 3):
        lines = Lines(path)
        lines.append({"a": value})
        lines.close()
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    path.write_text('{"a"')
    Lines(path).close()
    assert path.read_text() == ""


class FullDisk(io.FileIO):
    """A file on a disk that has room for five more bytes."""

    room = 5

    def write(self, text: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(bytes(text)[: self.room])
        self.room -= written
        return written


def test_a_full_disk_tears_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = Lines(path)
    lines.append({"a": 1})
    lines.file = FullDisk(path, "ab")
    with pytest.raises(OSError, match="No space left"):
        lines.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n'


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "rows.jsonl")

    def write(thread: int) -> None:
        for n in range(200):
            lines.append({"thread": thread, "n": n, "text": "x" * 1000})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines.close()
    rows = read_lines(tmp_path / "rows.jsonl")
    for thread in range(4):
        assert [row["n"] for row in rows if row["thread"] == thread] == list(range(200))


def test_goodput_of_a_history_reckoned_by_hand() -> None:
    """Killed twice: in step 4, with a checkpoint of step 2, and in step 4 again.

    1000 to 1010 start-up; steps of 10 s end at 1020, 1030; a save until 1032, steps until 1042 and
    1052, of which those of steps 3 and 4 are lost; killed. 1100 to 1104 start-up; step 3 until
    1114, a validation until 1117, a save until 1118, then killed in step 4. Another attempt fails
    at 1150 before training. 1200 to 1205 start-up; step 4 until 1215, a stop at 1216.
    """

    def start(time: float, seconds: float, attempt: int) -> dict[str, Any]:
        event = "start" if attempt == 1 else "restart"
        return {"time": time, "event": event, "attempt": attempt, "step": 0, "seconds": seconds}

    def save(time: float, seconds: float, attempt: int) -> dict[str, Any]:
        return {"time": time, "event": "save", "attempt": attempt, "blocked_seconds": seconds}

    def step(time: float, step: int, attempt: int) -> dict[str, Any]:
        return {"time": time, "step": step, "loss": 1.0, "seconds": 10.0, "attempt": attempt}

    events = [
        start(1009, 9, 1), save(1032, 2, 1),
        start(1103, 3, 2), {"time": 1117, "event": "validation", "attempt": 2, "seconds": 3},
        save(1118, 1, 2),
        {"time": 1150, "event": "stop", "attempt": 3, "reason": "error"},
        start(1205, 5, 4), {"time": 1216, "event": "stop", "attempt": 4, "reason": "finished"},
    ]  # fmt: skip
    rows = [step(1020, 1, 1), step(1030, 2, 1), step(1042, 3, 1), step(1052, 4, 1)]
    validation = {"time": 1117, "step": 3, "validation_loss": 1.0, "attempt": 2}
    rows += [step(1114, 3, 2), validation, step(1215, 4, 4)]
    spent = goodput(events, rows)
    assert spent is not None
    assert (spent.wall, spent.steps, spent.lost) == (216, 40, 20)
    assert (spent.saves, spent.validation, spent.start_up) == (3, 3, 10 + 4 + 5)
    assert spent.stopped == (1100 - 1052) + (1200 - 1118)
    assert spent.other == 1
    assert spent.share == 40 / 216
    shares = "repeated steps 9%, saves 1%, validation 1%, start-up 9%, stopped 60%, other 0%"
    assert spent.describe() == f"19% of 216 s; {shares}"
    # killed before its first step: what is known of the attempt is its start
    cut = goodput([*events[:2], events[2]], rows[:4])
    assert cut is not None
    assert (cut.wall, cut.start_up, cut.stopped) == (103, 10 + 3, 48)


def test_goodput_is_unknown_without_a_start() -> None:
    assert goodput([], [{"step": 1, "loss": 1.0}]) is None
    assert json.dumps(goodput([], [])) == "null"


@pytest.mark.parametrize("line", ["garbage", "[1]", "{}", '{"step": 7, "lo\0\0'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_text(f'{{"step": 1, "time": 1.0, "event": "start"}}\n{line}\n')
    with pytest.raises(UserError, match=rf"{name}, line 2: not an object with .*step"):
        Events().open(tmp_path)
