"""`bench checkpoint` at test size."""

from pathlib import Path

import pytest
import torch
from ranks import Ranks

from colonnade.bench import checkpoint
from colonnade.launcher.checkpoint import save, step_folder
from colonnade.models.config import ModelConfig
from colonnade.parallel.world import World


def measured(rank: int, size: int, folder: Path) -> dict[str, object]:
    """Runs the benchmark in a process that has a world already."""
    world = World(rank, size, torch.device("cpu"))
    model = ModelConfig(pattern="*-", hidden=16, heads=2, vocab=40, residual="standard")
    return checkpoint.measure(world, folder, model, seq_len=8, rounds=2)


def test_figures(ranks1: Ranks, tmp_path: Path) -> None:
    (report,) = ranks1.run(measured, tmp_path)
    names = (
        "torch save s", "blocked s", "thread s", "plain write s", "check s", "waited for s",
        "torch.save / blocked", "thread GB/s", "check GB/s", "plain write / thread",
    )  # fmt: skip
    assert all(report[name] > 0 for name in names)
    assert report["blocked s"] < report["thread s"]
    assert not list(tmp_path.glob("step-*"))


def test_a_check_that_finds_damage_stops_it(ranks1: Ranks, tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 1)
    save(folder, {"w": torch.ones(100)}, {})
    assert checkpoint.check(folder) > 0
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError, match="checksum"):
        checkpoint.check(folder)
