"""`bench init` at test size."""

from pathlib import Path

import pytest

from colonnade.bench.init import LAYOUTS, layers_that_fit, measure_layouts
from colonnade.models.config import ModelConfig


@pytest.mark.usefixtures("preloaded_workers")
def test_figures(tmp_path: Path) -> None:
    """Small ranks hold little above their shards, and a layout's shards are half of the model."""
    model = ModelConfig(pattern="*-", repeat=4, hidden=256, heads=4, vocab=512)
    report = measure_layouts(tmp_path / "hf", model)
    for layout in LAYOUTS:
        ((axis, degree),) = layout.items()
        assert report[f"{axis}={degree}, above bytes"] < 2**28
        # bf16 on the disk, fp32 in memory
        assert report[f"{axis}={degree}, shard bytes"] >= report["bytes on disk"]
    assert report["dp_shard=2, shard bytes"] == report["bytes on disk"]
    assert 1 <= layers_that_fit() <= 32
