"""`bench generate`: rows of one size, caches of the wanted length, a tiny run."""

import pytest
import torch

from colonnade.bench import generate, hosts
from colonnade.bench.generate import Size, Text, cache_bytes
from colonnade.bench.row import Shape

TINY = Size(hidden=128, layers=3)


def test_rows_have_one_size() -> None:
    sizes = [sum(p.numel() for p in model.parameters()) for model in TINY.models().values()]
    assert max(sizes) - min(sizes) <= 3 * TINY.hidden * TINY.layers
    assert TINY.patterns()["hybrid"] == "M-*-M-"


def test_a_text_has_its_context() -> None:
    model = TINY.models()["attention"]
    text = Text(model, 50)
    assert {len(rows.kept()) for rows in text.cache.rows.values()} == {51}
    assert text.advance().shape == (1, model.config.vocab)
    keys_and_values = 2 * 3 * 52 * model.config.kv_heads * 64 * 4
    assert cache_bytes(text.cache) == keys_and_values


def test_a_tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "unsupported_reason", lambda: "no")
    report = generate.run(TINY, contexts=(8, 16), rounds=1)
    assert report["ladder"] == "not measured: no"
    for name in ("attention tokens/s", "hybrid floor ms", "mamba / attention, speed"):
        assert report[f"8: {name}"] > 0
        assert report[f"16: {name}"] > 0


def test_a_tiny_run_on_two_hosts() -> None:
    if hosts.unsupported_reason() is not None:  # then the report says why
        assert "not measured" in str(generate.run(TINY, contexts=(8,), rounds=1)["ladder"])
        return
    torch.manual_seed(0)
    shape = Shape(repeat=2, hidden=128, seq=1, batch=2)
    figures = generate.on_hosts(shape, context=8, rounds=1, share=0.3)
    assert figures["ladder ms"] > 0
    assert figures["link Mbit/s"] > 0
