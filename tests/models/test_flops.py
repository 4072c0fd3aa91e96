"""The count of parameters and FLOPs against the products that PyTorch counts, and visible keys."""

from typing import Any

import pytest
from small import B, S, config_of, context, data, model_of
from torch.utils.flop_counter import FlopCounterMode

from colonnade.models.config import CARDS
from colonnade.models.shapes import measure

COSTS: list[tuple[str, dict[str, Any]]] = [
    ("--", {}),
    ("E-", {"shared_ffn": 4, "activation": "relu"}),
    ("T-", {}),
    ("-E", {"repeat": 3, "share": True}),
    ("-", {"mtp": 2, "mtp_pattern": "-E", "tied": True}),
    ("T", {"mtp": 1, "mtp_pattern": "T"}),
]


@pytest.mark.parametrize(("pattern", "fields"), COSTS)
def test_flops_are_those_of_the_products(pattern: str, fields: dict[str, Any]) -> None:
    """Products are counted while they run, forward and backward; vectors count as 2 per element."""
    model, (tokens, labels) = model_of(config_of(pattern, **fields), 11), data(11)
    with FlopCounterMode(display=False) as counter:
        model(tokens, context(), labels)[0].backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    passes = 2 if model.config.has("T") else 1
    products = measure(model.config, S).flops_per_token - 6 * passes * vectors
    assert counter.get_total_flops() == products * S * B
    assert measure(model.config, S).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("window", [None, 100, 1000])
def test_flops_of_attention_are_those_of_the_visible_keys(window: int | None) -> None:
    length = 500
    keys = sum(min(i + 1, window or length) for i in range(length)) / length
    for fields, width in ({}, 6 + 6), ({"attention": "mla", "rope_dim": 4, "value_dim": 8}, 10 + 8):
        config = config_of("*", window=window, **fields)
        expected = 2 * keys * 4 * width
        assert CARDS["*"].mixing_flops(config, length, 0) == pytest.approx(expected, rel=0.01)
