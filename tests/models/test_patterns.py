"""Hybrid patterns against the published one and Megatron's allocation; counts and spacing."""

import random
from collections.abc import Iterator

import pytest
from shown import Row

from colonnade.models.patterns import hybrid_pattern

TABLE = [
    Row("pattern generator", "attention and MLP ratios", "megatron-core", "symbols"),
]

PUBLISHED = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"  # arXiv:2406.07887


def drawn(seed: int, count: int) -> Iterator[tuple[int, float, float]]:
    """Yields layers and fractions, some with few digits, so that rounding and spacing have ties."""
    draw = random.Random(seed)
    for _ in range(count):
        attention = round(draw.random() * draw.choice((0.2, 1)), draw.choice((1, 2, 12)))
        mlp = round(draw.random() * (1 - attention), draw.choice((1, 2, 12)))
        if attention + mlp <= 1:
            yield draw.randint(1, 120), attention, mlp


def test_the_published_pattern() -> None:
    assert hybrid_pattern(56, 0.08, 0.5) == PUBLISHED


def test_random_patterns_are_megatrons() -> None:
    from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

    for shares in drawn(0, 2000):
        assert hybrid_pattern(*shares) == "".join(allocate_layers(*shares)), shares


def test_counts_are_the_shares_rounded() -> None:
    for layers, attention, mlp in drawn(1, 2000):
        row = hybrid_pattern(layers, attention, mlp, ("G", "*", "E"))
        assert len(row) == layers
        assert row.count("*") == round(layers * attention)
        assert row.count("E") == min(round(layers * mlp), layers - row.count("*"))
        assert set(row) <= set("G*E")


def test_spacing_is_even() -> None:
    """Before the k-th symbol there are k times the mean gap of others, up to rounding."""
    for shares in drawn(2, 2000):
        row = hybrid_pattern(*shares)
        inner = row.replace("*", "")
        for line, symbol, sections in (
            (row, "*", row.count("*") + 1),
            (inner, "-", max(1, inner.count("-"))),
        ):
            others = line.split(symbol)
            before = [len("".join(others[:k])) for k in range(1, len(others))]
            gap = len("".join(others)) / sections
            assert all(abs(b - k * gap) <= 0.5 + 1e-9 for k, b in enumerate(before, 1)), shares


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0.1, 0.5), "layers = 0.*positive"),
        ((8, -0.1, 0.5), "attention = -0.1.*0 to 1"),
        ((8, 0.1, 1.5), "mlp = 1.5.*0 to 1"),
        ((8, float("nan"), 0.5), "attention = nan.*0 to 1"),
        ((8, 0.6, 0.5), "mlp = 0.5.*at most 0.4"),
        ((8, 0.1, 0.5, ("M", "*", "M")), "symbols = .*different"),
        ((8, 0.1, 0.5, ("M", "*", "x")), r"symbols = .* \* M m S D G - E T"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hybrid_pattern(*arguments)
