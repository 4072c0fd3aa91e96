"""Which rank failed first, or did not reach which collective: records, sentences, reports."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kills import children
from ranks import Ranks

from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.cluster.failures import report
from colonnade.launcher.cluster.failures.explain import explain
from colonnade.launcher.cluster.failures.flight import Collective, Group, collectives, waiting_for
from colonnade.launcher.cluster.failures.position import Position
from colonnade.launcher.cluster.failures.record import (
    CAUSE,
    LOST,
    STUCK,
    Record,
    is_lost_peer,
    read_records,
    record_of,
)
from colonnade.launcher.cluster.failures.report import FailureReporter, explained, write_hosts
from colonnade.launcher.errors import ReportedError, UserError
from colonnade.launcher.train.metrics import read_metrics
from colonnade.parallel.world import World

TP, DP = Group("tp", (0, 1)), Group("dp_shard", (1, 2))
HOSTS = ["n1", "n1", "n2", "n2"]
STACK = 'thread MainThread:\n  File "/x/launcher/data/files.py", line 12, in read\n    wait()\n'


def collective(group: Group, number: int) -> Collective:
    return Collective(group, "all_reduce", number, [[4]], 1000.0, False)


def record(
    rank: int, waits: Collective | None, last: list[tuple[Group, int]], kind: str = LOST
) -> Record:
    return Record(rank, HOSTS[rank], kind, 10.0 + rank, "step 3", "E: x", STACK, waits, last)


def test_a_rank_without_a_record_is_the_one_that_others_wait_for() -> None:
    waits = collective(TP, 7)
    text = explain({0: record(0, waits, [(TP, 7)])}, HOSTS[:2])
    assert "rank 1 on n1 did not reach all_reduce number 7 of tp (ranks 0, 1)" in text
    assert "for which rank 0 on n1 has waited" in text
    assert "rank 1 on n1 left no record" in text


def test_waiting_is_followed_from_rank_to_rank() -> None:
    """Rank 0 waits for 1, which waits for 2, which reads."""
    records = {
        0: record(0, collective(TP, 7), [(TP, 7)]),
        1: record(1, collective(DP, 4), [(TP, 6), (DP, 4)]),
        2: record(2, None, [(DP, 3)], STUCK),
    }
    text = explain(records, HOSTS)
    assert text.startswith("rank 2 on n2 did not reach all_reduce number 4 of dp_shard")
    assert "It was at /x/launcher/data/files.py:12, in read (step 3)." in text


def test_ranks_in_different_collectives_are_told() -> None:
    """Each waits for the other: the order of calls differs."""
    both = Group("all ranks", (0, 1, 2))
    records = {
        0: record(0, collective(TP, 7), [(TP, 7), (both, 1)]),
        1: record(1, collective(both, 2), [(TP, 6), (both, 2)]),
        2: record(2, collective(both, 2), [(both, 2)]),
    }
    assert "the ranks differ in their order of calls" in explain(records, HOSTS)


def test_a_rank_that_hung_is_named_where_nobody_knows_what_was_awaited() -> None:
    """gloo's recorder has no sends and receives."""
    records = {0: record(0, None, [], STUCK), 1: record(1, None, [])}
    text = explain(records, HOSTS[:2])
    assert text.startswith("rank 0 on n1 hung (step 3), while others waited for it")
    assert "files.py:12" in text


def test_numbers_of_sends_are_compared_with_nobody() -> None:
    sent = collective(DP, 24)._replace(between_two=True)
    records = {1: record(1, sent, []), 2: record(2, None, [], STUCK)}
    assert explain(records, HOSTS[:3]).startswith("rank 2 on n2 hung")


def test_the_first_cause_is_told_with_its_trace() -> None:
    records = {0: record(0, None, [], CAUSE), 1: record(1, collective(TP, 1), [(TP, 1)])}
    text = explain(records, HOSTS)
    assert text.startswith("rank 0 on n1 failed first (step 3): E: x\nthread MainThread")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:537] Connection reset by peer"), True),
        (dist.DistStoreError("wait timeout after 5 ms"), True),
        (RuntimeError("shape mismatch"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),  # of a data source
        (ZeroDivisionError("gloo/"), False),
    ],
)
def test_errors_that_only_say_that_another_rank_is_gone(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) == lost
    handled = ValueError("own")
    handled.__context__ = error  # raised while the other one was handled
    assert not is_lost_peer(handled)


def in_flight(rank: int, size: int) -> tuple[str | None, int, str]:
    """What rank 0 waits for while rank 1 is late, and the record of an error of rank 1."""
    group = dist.new_group(list(range(size)))
    axes = {tuple(range(size)): "dp_shard"}
    dist.all_reduce(torch.ones(3), group=group)
    if rank == 0:
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
        waits = waiting_for(collectives(axes))
        dist.barrier()  # of another group
    else:
        waits = waiting_for(collectives(axes))
        dist.barrier()
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
    work.wait()
    try:
        on_rank_zero(lambda: {}["planted"])
    except KeyError as error:
        kind = record_of(rank, "step 1", collectives(axes), error).kind
    return (None if waits is None else str(waits)), (0 if waits is None else waits.number), kind


def test_a_collective_in_flight_is_what_a_rank_waits_for(ranks2: Ranks) -> None:
    (waits, number, kind), (nothing, _, kind_of_one) = ranks2.run(in_flight)
    assert waits == f"all_reduce number {number} of dp_shard (ranks 0, 1)"
    assert nothing is None
    assert (kind, kind_of_one) == (CAUSE, LOST)  # an error that rank 0 has shared is rank 0's


def reporter(folder: Path, rank: int, timeout: float = 1800) -> FailureReporter:
    world = World(rank, 2, torch.device("cpu"), None, timedelta(seconds=timeout))
    return FailureReporter(folder, world, Position(), ["n1", "n2"])


def test_the_rank_that_failed_prints_and_others_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ReportedError) as first, reporter(tmp_path, 1).reporting():
        raise ArithmeticError("planted")
    told = capsys.readouterr().err
    assert told.count("colonnade: rank 1 on") == 1
    assert "ArithmeticError: planted" in told
    assert (
        first.value.cause == f"rank 1 on {socket.gethostname()} failed first (before the first "
        "step): ArithmeticError: planted"
    )
    silent = pytest.raises(ReportedError, match="another rank failed first")
    with silent, reporter(tmp_path, 0).reporting():
        raise RuntimeError("gloo/transport: Connection closed by peer")
    assert "colonnade:" not in capsys.readouterr().err
    assert {r: record.kind for r, record in read_records(tmp_path).items()} == {0: LOST, 1: CAUSE}


def test_ranks_that_lost_a_silent_one_print_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "GRACE_PERIOD", 0.2)
    for _ in range(2):
        with pytest.raises(ReportedError), reporter(tmp_path, 0).reporting():
            raise RuntimeError("gloo/transport: Connection closed by peer")
    assert capsys.readouterr().err.count("colonnade: rank 1 on n2 left no record") == 1
    write_hosts(tmp_path, ["n1", "n2"])
    assert (explained(tmp_path) or "").startswith("rank 1 on n2 left no record")


def test_a_mistake_of_all_ranks_is_printed_by_one(tmp_path: Path) -> None:
    with pytest.raises(UserError), reporter(tmp_path, 0).reporting():
        raise UserError("theirs")
    with pytest.raises(ReportedError, match="theirs"), reporter(tmp_path, 1).reporting():
        raise UserError("theirs")


def test_a_rank_that_hangs_has_a_record_until_it_goes_on(tmp_path: Path) -> None:
    hanging = reporter(tmp_path, 1, timeout=0.5)
    path = tmp_path / "rank-1.json"
    with hanging.watching():
        wait_for(path.exists)
        found = read_records(tmp_path)[1]
        assert found.kind == STUCK
        assert "test_a_rank_that_hangs" in found.trace
        hanging.position.enter("update")
        wait_for(lambda: not path.exists())
    assert "watch" not in [thread.name for thread in threading.enumerate()]


def wait_for(condition: object, seconds: float = 60) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    """`train --restarts`: the job goes on from its newest checkpoint, and says why."""
    run = tmp_path / "run"
    fields = ["train.steps=400", "train.seq_len=16", "model.pattern=-", "model.repeat=1",
              "model.hidden=16", "train.global_batch=4", "train.micro_batch=1",
              "train.validate_rows=0", "train.sample=0", "checkpoint.every=3"]  # fmt: skip
    command = [sys.executable, "-m", "colonnade.launcher", "train", "quickstart", *fields]
    command += ["--nproc", "2", "--run", str(run), "--restarts", "1", "--until", "60"]
    job = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (run / "checkpoints" / "step-00000003").exists(), 120)
    ranks = [p for p in children(job.pid) if "_rank" in Path(f"/proc/{p}/cmdline").read_text()]
    os.kill(ranks[-1], signal.SIGKILL)
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert "colonnade: start 2, after: rank" in errors
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
    assert {row["attempt"] for row in rows} == {1, 2}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (restart,) = [event for event in events if event["event"] == "restart"]
    assert restart["step"] >= 3
