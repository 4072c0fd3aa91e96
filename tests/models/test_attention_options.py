"""Compares options of `*` with their formulas per token and head: gates, filters, temperature."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import gradients
from shown import Row
from small import S, config_of, context, data, model_of
from torch import Tensor

from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import Wiring


def attended(model: Decoder, t: int, x: Tensor) -> Tensor:
    """Computes sub-block t's output from its normed input `[S, B, D]`, per sample and head."""
    c, weights = model.config, dict(model.wiring.block(t).named_parameters())
    width, window = c.head_dim, c.window_of(t)
    group = c.heads // (c.kv_heads or c.heads)
    columns = []
    for b in range(x.shape[1]):
        rows = {}
        for name in "qkv":
            y = x[:, b] @ weights[name].T
            if c.attention_conv:
                taps = weights[f"conv_{name}"]
                y = torch.stack(
                    [
                        sum(
                            (
                                taps[:, -1 - j] * y[s - j]
                                for j in range(min(c.attention_conv, s + 1))
                            ),
                            start=torch.zeros_like(y[0]),
                        )
                        for s in range(S)
                    ]
                )
            rows[name] = y.view(S, -1, width)
        heads = []
        for h in range(c.heads):
            q, k, v = rows["q"][:, h], rows["k"][:, h // group], rows["v"][:, h // group]
            if c.position_temperature:
                n = torch.arange(1, S + 1, dtype=x.dtype)
                beta = weights["growth"][h]
                q = q * (1 + torch.exp(-torch.exp(beta)) * n.log())[:, None]
            out = []
            for i in range(S):
                first = 0 if window is None else max(0, i - window + 1)
                scores = k[first : i + 1] @ q[i] / math.sqrt(width)
                p = scores.softmax(0)
                p = torch.clamp((c.clip_high - c.clip_low) * p + c.clip_low, 0, 1)
                out.append(p @ v[first : i + 1])
            y = torch.stack(out)
            if c.attention_gate == "head":
                inputs = slice(h * c.hidden // c.heads, (h + 1) * c.hidden // c.heads)
                gate = F.linear(x[:, b, inputs], weights["gate_w"][h : h + 1], weights["gate_b"][h])
                y = y * gate.sigmoid()
            if c.attention_gate == "channel":
                gate = x[:, b] @ weights["gate_z"].view(c.heads, width, -1)[h].T
                y = y * gate.sigmoid()
            heads.append(y)
        columns.append(torch.cat(heads, -1) @ weights["out"].T)
    return torch.stack(columns, 1)


CASES: dict[str, dict[str, Any]] = {
    "sigmoid gate per head": {"attention_gate": "head"},
    "sigmoid gate per channel": {"attention_gate": "channel", "kv_heads": 2},
    "Primer's convolutions": {"attention_conv": 3, "kv_heads": 2},
    "position temperature": {"position_temperature": True},
    "clipped softmax": {"clip_low": -0.06, "clip_high": 1.02},
    "mixed spans": {"window": 4, "full_attention": (1,)},
    "all of it": {"attention_gate": "head", "attention_conv": 2, "clip_low": -0.06,
                  "position_temperature": True, "window": 6, "kv_heads": 2},
}  # fmt: skip


TABLE = [Row("*", name, "its formula, per token and head") for name in CASES]


@pytest.mark.parametrize("name", CASES)
def test_option_is_its_formula(name: str) -> None:
    config = config_of("***", positions="none", **CASES[name])
    model, tokens = model_of(config, 1), data(1)[0]
    wiring: Wiring = model.wiring
    g = torch.Generator().manual_seed(1)
    target = torch.randn(S, tokens.shape[1], config.hidden, generator=g, dtype=torch.float64)

    ours, _ = wiring(model.embedding(tokens, context().positions), context())
    (ours * target).sum().backward()
    our_gradients = {n: g for n, g in gradients(model.wiring).items()}
    model.zero_grad()

    stream = model.embedding(tokens, context().positions)
    for t in range(3):
        stream = stream + attended(model, t, wiring.norms[str(t)](stream))
    expected = wiring.final(stream)
    (expected * target).sum().backward()
    assert_equal({"out": ours.detach()}, {"out": expected.detach()})
    assert_equal(our_gradients, gradients(model.wiring))


def test_the_temperature_counts_from_each_document() -> None:
    """Positions start from 0 in each packed document, and n from 1."""
    model, tokens = (
        model_of(config_of("*", position_temperature=True, positions="none"), 2),
        data(2)[0],
    )
    index = torch.arange(S)[:, None].expand(S, 2)
    documents = (index >= 9).long()
    packed = Context(index - 9 * documents, documents)
    with torch.no_grad():
        unpacked = model(tokens[9:], Context(index[: S - 9]))
        assert_equal({"logits": model(tokens, packed)[9:]}, {"logits": unpacked})
