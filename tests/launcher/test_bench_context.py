"""`bench context`: a tiny run of every part, and what its figures are; no time is judged."""

import mmap
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from colonnade.bench import context, crew
from colonnade.bench.context import Shape
from colonnade.launcher.cluster.memory import resident_mib
from colonnade.launcher.errors import UserError
from colonnade.models.config import ModelConfig
from colonnade.parallel.world import World

TINY = Shape(tokens=64, heads=4, kv_heads=4, width=8)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_shares_the_work(ranks: int) -> None:
    figures = context.work(ranks)
    assert figures[f"work, cp {ranks}: zigzag, largest of a rank / smallest"] == 1
    assert figures[f"work, cp {ranks}: contiguous, largest of a rank / smallest"] == 2 * ranks - 1
    ratio = figures[f"work, cp {ranks}: longest way, contiguous / zigzag"]
    assert ratio == figures[f"work, cp {ranks}: limit of that"]


def test_a_tiny_run() -> None:
    model = ModelConfig(pattern="M*-", hidden=32, heads=2, ffn=48, mamba_head_dim=16, vocab=64)
    report = context.run(TINY, rounds=1, weighed=TINY, model=model, lengths=(64, 128), ranks=2)
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


def weighed(rank: int, size: int, variant: str) -> list[int]:
    world = World(rank, size, torch.device("cpu"))
    return [context.attention_bytes(world, variant, cp, TINY) for cp in (1, 2, 4)]


@pytest.mark.parametrize("variant", ["ring", "allgather", "ulysses"])
def test_attention_keeps_its_share(ranks4: Ranks, variant: str) -> None:
    """Inputs, output, and of every head and query the logarithm of a sum."""
    whole = 4 * TINY.tokens * TINY.heads * (4 * TINY.width + 1)
    for found in ranks4.run(weighed, variant):
        assert found == [whole, whole // 2, whole // 4]


def test_a_peak_is_forgotten() -> None:
    big = mmap.mmap(-1, 2**27)
    for _ in range(2**7):
        big.write(b"x" * 2**20)
    high = resident_mib()
    big.close()
    context.forget_peak()
    assert resident_mib() < high - 100


def failing(world: World, who: int) -> int:
    if world.rank == who:
        raise UserError("cannot")
    return world.rank


def test_ranks_answer_until_one_fails() -> None:
    with crew.Ranks(2) as ranks:
        assert ranks.run(failing, -1) == [0, 1]
        pids = [process.pid for process in ranks.processes]
        with pytest.raises(UserError, match="cannot"):
            ranks.run(failing, 1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
