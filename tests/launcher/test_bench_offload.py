"""`bench offload` at test size."""

from pathlib import Path

import pytest
import torch

from colonnade.bench import host_adamw
from colonnade.launcher.cluster.compiler import cpp_compiler

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_figures() -> None:
    report = host_adamw.run(elements=6400, rounds=2)
    moved = {host_adamw.OURS: 30, host_adamw.BARE: 28, host_adamw.THREE: 42, host_adamw.FLOOR: 30}
    for name, size in moved.items():
        speed = report[f"{name}: parameters/s"]
        assert report[f"{name}: bytes/s, {size} a parameter"] == speed * size > 0
    for name in (host_adamw.THREE, host_adamw.FLOOR):
        assert report[f"speed, {host_adamw.OURS} / {name}"] > 0
    assert report["processor"]


def test_the_floor_moves_every_byte() -> None:
    """It changes every element of what it writes, whatever the number of threads."""
    torch.set_num_threads(3)
    count = 64 * 5000
    a, b, c = (torch.zeros(count) for _ in range(3))
    x, w = torch.ones(count), torch.full((count,), -1, dtype=torch.int16)
    host_adamw.traffic((a, x, b, c, w))()
    assert all(torch.equal(t, x) for t in (a, b, c))
    assert not (w == -1).any()
