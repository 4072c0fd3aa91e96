"""`bench convert` at test size."""

from pathlib import Path

from colonnade.bench.convert import measure
from colonnade.models.config import ModelConfig


def test_figures(tmp_path: Path) -> None:
    model = ModelConfig(pattern="*-", repeat=2, hidden=16, heads=2, vocab=40)
    report = measure(tmp_path, model)
    names = (
        "plain write GB/s", "plain read s", "direct write s", "direct read GB/s", "to native s",
        "to hf GB/s", "plain / to native", "direct / to hf",
    )  # fmt: skip
    assert all(report[name] > 0 for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "native"]
