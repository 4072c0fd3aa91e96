"""`bench offload` at test size."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from colonnade.bench import host_adamw, offload_clock, offload_gpu
from colonnade.launcher.cluster.compiler import cpp_compiler
from colonnade.launcher.train.job import build_engine
from colonnade.parallel.world import open_world

TINY = offload_gpu.Shape(
    layers=2, hidden=128, ffn=64, vocab=64, seq_len=16, rows=1, micro_batches=2, steps=2
)

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


def test_one_gpu_without_one() -> None:
    """The device is the host: its four optimizers train, and the report has their ratios."""
    if not torch.cuda.is_available():
        assert offload_gpu.run() == {"not run": "there is no GPU"}
    report = offload_gpu.run(TINY, torch.device("cpu"))
    assert report["interleaved"]["groups_on_device"] > 0 == report["flush"]["groups_on_device"]
    for name in ("serial / interleaved", "flush / interleaved", "interleaved / device"):
        assert report[name] > 0


def test_simulated_devices_are_drawn(tmp_path: Path) -> None:
    report = offload_clock.run(tmp_path / "lanes.png")
    assert report["GH200: serial / interleaved"] > 1
    assert (tmp_path / "lanes.png").stat().st_size > 10_000


def test_an_optimizer_is_freed_before_the_next() -> None:
    """The host has the memory for the state of one."""
    with open_world(0, 1, torch.device("cpu")) as world:
        recipe = TINY.recipe("host")
        engine = build_engine(recipe, world, offload_gpu.cheap_weights)
        for kind in offload_gpu.KINDS:
            offload_gpu.time_steps(engine, TINY)
            optimizer, parts = weakref.ref(engine.optimizer), offload_gpu.Without.of(engine)
            del engine
            gc.collect()
            assert optimizer() is None
            engine = parts.optimized(recipe, kind)
        del engine, parts
