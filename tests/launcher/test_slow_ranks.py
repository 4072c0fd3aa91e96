"""Working times of ranks: a rank that is slow in its passes or its data is named, and no other."""

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from colonnade.launcher.cluster.waits import HostWaits, recorded_seconds
from colonnade.launcher.data.prefetch import Prefetcher
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.events import read_events
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.watch.ranks import Comparison, Measured, working_times
from colonnade.models.decoder import Decoder
from colonnade.parallel.world import World

SECONDS = 0.3  # of an injected delay, many times what a step of the tiny model takes
WINDOW = 3


@contextmanager
def delayed(owner: type, name: str, seconds: float) -> Iterator[None]:
    """Every call of a method takes so many seconds more while the block runs."""
    method = getattr(owner, name)

    def slow(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(seconds)
        return method(*arguments, **keywords)

    setattr(owner, name, slow)
    try:
        yield
    finally:
        setattr(owner, name, method)


PLACES: dict[str, tuple[type, str]] = {
    "passes": (Decoder, "forward"),
    "data": (Prefetcher, "_read"),
}


def job(
    rank: int, size: int, recipe: Recipe, run: Path, place: str, slow: Sequence[int]
) -> tuple[str, bool]:
    """Runs a job some of whose ranks are slow in one place; returns what a rank prints, and whether
    `Work.wait` is what it was."""
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "recipe.toml").write_text(dump_recipe(recipe))
    wait, world = dist.Work.wait, World(rank, size, torch.device("cpu"))
    seconds = SECONDS if rank in slow else 0.0
    with redirect_stdout(io.StringIO()) as printed, delayed(*PLACES[place], seconds):
        run_job(recipe, run, world)
    return printed.getvalue(), dist.Work.wait is wait


@pytest.mark.parametrize(
    ("count", "layout", "place", "slow"),
    [
        (2, "parallel.dp_shard=2", "passes", 1),
        (2, "parallel.dp_shard=2", "data", 0),
        (2, "parallel.pp=2", "passes", 1),
        (4, "parallel.tp=2", "passes", 2),
    ],
)
def test_a_slow_rank_is_named_and_no_other(
    ranks2: Ranks,
    ranks4: Ranks,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    count: int,
    layout: str,
    place: str,
    slow: int,
) -> None:
    fields = (f"monitor.ranks_every={WINDOW}", f"train.steps={2 * WINDOW}", "train.validate_rows=0")
    settings = recipe(
        *fields, "train.global_batch=4", "model.pattern=*-", "train.micro_batch=1", layout
    )
    ranks = {2: ranks2, 4: ranks4}[count]
    (printed, restored), *others = ranks.run(job, settings, tmp_path, place, [slow])
    events = [e for e in read_events(tmp_path) if e["event"] == "slow_rank"]
    (event,) = events  # it is said once
    # data are read ahead, so that the first steps need not wait for them
    assert event["step"] == WINDOW or place == "data"
    assert event["rank"] == slow
    assert event["seconds"] > max(SECONDS, 1.5 * event["median"])
    sentences = [line for line in printed.splitlines() if line.startswith("slow rank")]
    assert len(sentences) == 1
    assert sentences[0].startswith(f"slow rank: rank {slow} on {event['host']} works ")
    assert f"to {event['step']}, " in sentences[0]
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "working_seconds" in r]
    assert [row["step"] for row in rows] == [WINDOW, 2 * WINDOW]
    assert (rows[-1]["slowest_rank"], rows[-1]["slowest_host"]) == (slow, event["host"])
    assert rows[-1]["working_seconds"]["largest"] > SECONDS
    assert restored
    assert all(text == "" and whole for text, whole in others)


def test_ranks_that_are_equally_slow_are_not_named(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    fields = (
        f"monitor.ranks_every={WINDOW}",
        f"train.steps={WINDOW}",
        "model.pattern=*-",
        "train.validate_rows=0",
    )
    (printed, _), _ = ranks2.run(job, recipe(*fields), tmp_path, "passes", [0, 1])
    assert "slow rank" not in printed
    assert [e["event"] for e in read_events(tmp_path) if e["event"] == "slow_rank"] == []
    (row,) = (r for r in read_metrics(tmp_path / "metrics.jsonl") if "working_seconds" in r)
    assert row["working_seconds"]["median"] > SECONDS


def test_nothing_is_compared_where_it_is_turned_off(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    fields = ("monitor.ranks_every=0", "train.steps=2", "model.pattern=*-", "train.validate_rows=0")
    ranks2.run(job, recipe(*fields), tmp_path, "passes", [1])
    assert not any("working_seconds" in row for row in read_metrics(tmp_path / "metrics.jsonl"))
    assert not any(event["event"] == "slow_rank" for event in read_events(tmp_path))


def waits(rank: int, size: int) -> list[float]:
    """Lets rank 1 come late to collectives of every kind; returns the waits of each, and one that
    does not count."""
    host, tensor, c10d = HostWaits(), torch.ones(4), torch.ops._c10d_functional
    group = dist.group.WORLD.group_name

    def exchange() -> None:
        if rank == 0:
            dist.recv(tensor, 1)
        else:
            dist.send(tensor, 0)

    collectives: list[Callable[[], object]] = [
        lambda: dist.all_reduce(tensor),
        lambda: dist.all_reduce(tensor, async_op=True).wait(),
        lambda: c10d.wait_tensor(c10d.all_reduce(tensor, "sum", group)),
        exchange,
    ]
    with host.measuring():
        for collective in collectives:
            dist.barrier()
            with host.counted():
                if rank == 1:
                    time.sleep(SECONDS)
                collective()
            host.end_step()
        if rank == 1:
            time.sleep(SECONDS)
        dist.barrier()
        host.end_step()
    return host.take()


def test_every_kind_of_wait_is_measured(ranks2: Ranks) -> None:
    early, late = ranks2.run(waits)
    for waited, not_waited in zip(early[:-1], late[:-1], strict=True):
        assert waited - not_waited > SECONDS / 2
    assert early[-1] == late[-1] == 0.0


def test_the_rank_that_waits_least_has_worked_all_of_the_time() -> None:
    """Rank 1 works 2 s where the others work 1; communication of 0.5 s is everybody's."""
    step = [Measured(2.5, 1.5), Measured(2.5, 0.5), Measured(2.5, 1.5)]
    late = [Measured(2.0, 0.5), Measured(2.0, 1.0), Measured(2.0, 1.0)]
    assert working_times([step, late]) == [[1.5, 2.0], [2.5, 1.5], [1.5, 1.5]]
    unknown = [Measured(2.5, math.nan), Measured(2.5, 0.5), Measured(2.5, 1.5)]
    assert working_times([unknown, step]) == [[1.5], [2.5], [1.5]]
    assert working_times([unknown]) == [[], [], []]


def test_a_few_long_steps_make_no_slow_rank() -> None:
    others = [[1.0] * 8] * 2
    assert Comparison([*others, [9.0] * 6 + [1.0] * 2], 1.5).slow == {2}
    assert Comparison([*others, [9.0] * 5 + [1.0] * 3], 1.5).slow == set()


def test_the_median_is_the_lower_one() -> None:
    """Of two ranks the one that works less, or no rank could be slow."""
    assert Comparison([[1.0], [1.6]], 1.5).slow == {1}
    assert Comparison([[1.0], [1.4]], 1.5).slow == set()
    assert Comparison([[1.0], [1.1], [1.7], [1.8]], 1.5).slow == {2, 3}
    assert Comparison([[1.0], [1.1], [1.2], [1.8]], 2.0).slow == set()
    times = [[1.0, 1.0, 7.0], [3.0, 0.0, 4.0], [2.0, 2.0, 2.0]]
    assert Comparison(times, 1.5).row(["a", "b", "c"]) == {
        "working_seconds": {"median": 2.0, "largest": 3.0},
        "slowest_rank": 1,
        "slowest_host": "b",
    }


def test_times_of_recorded_collectives() -> None:
    """Those launched in the intervals of a step; none where one is missing or has no time."""
    entries = [{"time_created_ns": 10 * n, "duration_ms": float(n)} for n in range(1, 6)]
    assert recorded_seconds(entries, [(15, 25), (35, 45)]) == pytest.approx(0.006)
    assert math.isnan(recorded_seconds(entries, [(5, 25)]))  # its first ones may be lost
    assert math.isnan(recorded_seconds([], [(15, 25)]))
    del entries[3]["duration_ms"]
    assert math.isnan(recorded_seconds(entries, [(15, 25), (35, 45)]))
    assert recorded_seconds(entries, [(15, 25)]) == pytest.approx(0.002)
