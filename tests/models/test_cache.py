"""Logits computed with a cache, a few tokens at a time, equal those of one forward pass."""

from typing import Any

import pytest
import torch
from equal import assert_equal
from shown import Row
from small import S, config_of, context, data, model_of

from colonnade.models.cache import Cache
from colonnade.models.config import CARDS
from colonnade.models.context import Context
from colonnade.parallel.passes import evaluating

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{symbol: (symbol * 2, {}) for symbol in CARDS},
    "hybrid, ladder": ("MmSD*GE-T", {"residual": "ladder"}),
    "shared": ("*M-", {"repeat": 2, "share": True}),
    "grouped queries, window": ("***", {"kv_heads": 2, "window": 4, "full_attention": (1,)}),
    "window of one": ("*", {"window": 1}),
    "positions by kind": (
        "****",
        {"window": 4, "full_attention": (1, 3), "window_rope_theta": 30.0, "unrotated": (3,),
         "window_rope_scaled": False, "rope_scaling": "linear", "rope_factor": 2.0},
    ),
    "latent attention": ("*-*", {"attention": "mla", "q_rank": 5, "kv_rank": 7, "rope_dim": 4}),
    "gates, norms, convolutions": (
        "**",
        {"attention_gate": "head", "qk_norm": "head", "attention_conv": 3, "attention_bias": "all"},
    ),
    "yarn, sinks, cap": (
        "**",
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 8, "sinks": True,
         "attention_cap": 2.0},
    ),
    "clipped softmax, temperature": (
        "**", {"clip_low": -0.05, "clip_high": 1.1, "position_temperature": True,
               "query_temperature": 0.5, "query_temperature_length": 5},
    ),
    "learned positions": ("**", {"positions": "none", "learned_positions": 40}),
    "norms by kind": ("G-*-", {"norm_after": "*", "delta_norm_eps": 1e-2, "delta_negative": True}),
    "capacity": ("E*E", {"capacity": 1.0}),
    "normed dt, B, C": ("mm", {"mamba1_norm": "weighted"}),
}  # fmt: skip


TABLE = [
    Row("every symbol, cached", name, "logits of the whole row")
    for name in CASES
    if name not in CARDS
]


@pytest.mark.parametrize("sizes", [(1,) * S, (9, 1, 1, 2, 10), (S - 1, 1)])
@pytest.mark.parametrize("name", CASES)
def test_cached_logits(name: str, sizes: tuple[int, ...]) -> None:
    pattern, fields = CASES[name]
    model = model_of(config_of(pattern, **fields), seed=1)
    tokens, _ = data(1)
    cache, logits, start = Cache(), [], 0
    with evaluating(model):
        expected = model(tokens, context())
        for size in sizes:
            rows = slice(start, start + size)
            logits.append(model(tokens[rows], Context(context().positions[rows], cache=cache)))
            start += size
    assert_equal({"logits": torch.cat(logits)}, {"logits": expected})


def test_a_window_bounds_its_cache() -> None:
    model = model_of(config_of("**", window=4, full_attention=(1,)), seed=2)
    cache = Cache()
    with evaluating(model):
        model(data(2)[0], context(cache=cache))
    assert [len(cache.get(t, "k")) for t in (0, 1)] == [3, S]


def test_a_latent_cache_holds_latents_alone() -> None:
    fields = {"attention": "mla", "kv_rank": 7, "rope_dim": 4}
    model = model_of(config_of("*", **fields), seed=3)
    cache = Cache()
    with evaluating(model):
        model(data(3)[0], context(cache=cache))
    assert {role: t.kept().shape[2:] for (_, role), t in cache.rows.items()} == {
        "latent": (7,),
        "k_rope": (1, 4),
    }
