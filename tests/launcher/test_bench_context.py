"""`bench context`: a tiny run of every section, and its figures; no test asserts a time."""

import mmap
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from colonnade.bench import context
from colonnade.bench.context import Shape
from colonnade.bench.worker_pool import RankPool
from colonnade.launcher.cluster.memory import resident_mib
from colonnade.launcher.errors import UserError
from colonnade.models.config import ModelConfig
from colonnade.parallel.world import World

pytestmark = pytest.mark.usefixtures("preloaded_workers")

TINY = Shape(tokens=64, heads=4, kv_heads=4, width=8)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_balances_the_work(ranks: int) -> None:
    figures = context.work_balance(ranks)
    assert figures[f"work, cp {ranks}: zigzag, largest of a rank / smallest"] == 1
    assert figures[f"work, cp {ranks}: contiguous, largest of a rank / smallest"] == 2 * ranks - 1
    ratio = figures[f"work, cp {ranks}: longest way, contiguous / zigzag"]
    assert ratio == figures[f"work, cp {ranks}: limit of that"]


def test_a_tiny_run() -> None:
    model = ModelConfig(pattern="M*-", hidden=32, heads=2, ffn=48, mamba_head_dim=16, vocab=64)
    report = context.run(TINY, rounds=1, memory_shape=TINY, model=model, lengths=(64, 128), ranks=2)
    assert all(report[f"time, cp 2: {n} ms"] > 0 for n in ("zigzag", "contiguous", "one process"))
    assert report["time, cp 2: contiguous / zigzag"] > 0
    equal = {key: value for key, value in report.items() if key.endswith("equal on all ranks")}
    assert len(equal) == 14
    assert all(equal.values())
    assert report["sent, M, states: bytes a rank, counted"] > 0
    for tokens in (64, 128):
        peak = report[f"step, {tokens} tokens: peak MiB of a rank"]
        assert peak > report[f"step, {tokens} tokens: MiB above those before the step"] >= 0
    assert report["step: growth of tokens"] == 2


def attention_bytes(rank: int, size: int, variant: str) -> list[int]:
    world = World(rank, size, torch.device("cpu"))
    return [context.attention_bytes(world, variant, cp, TINY) for cp in (1, 2, 4)]


@pytest.mark.parametrize("variant", ["ring", "allgather", "ulysses"])
def test_attention_saves_its_shard(ranks4: Ranks, variant: str) -> None:
    """A rank saves its shards of the inputs, of the output, and of each head's and query's LSE."""
    one_rank = 4 * TINY.tokens * TINY.heads * (4 * TINY.width + 1)
    for sizes in ranks4.run(attention_bytes, variant):
        assert sizes == [one_rank, one_rank // 2, one_rank // 4]


def test_the_peak_is_reset() -> None:
    buffer = mmap.mmap(-1, 2**27)
    for _ in range(2**7):
        buffer.write(b"x" * 2**20)
    peak = resident_mib()
    buffer.close()
    context.reset_peak()
    assert resident_mib() < peak - 100


def fail_on(world: World, rank: int) -> int:
    if world.rank == rank:
        raise UserError("cannot")
    return world.rank


def test_ranks_return_results_until_one_fails() -> None:
    with RankPool(2) as pool:
        assert pool.run(fail_on, -1) == [0, 1]
        pids = [process.pid for process in pool.processes]
        with pytest.raises(UserError, match="cannot"):
            pool.run(fail_on, 1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
