"""Packed rows: best fit equals its definition, rows equal a loop over documents; resuming."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colonnade.launcher.data import IndexedWriter, open_data
from colonnade.launcher.data.packing import PackedRows, best_fit
from colonnade.launcher.data.rows import IndexedRows, Tokens
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.load import load_recipe

VOCAB, S = 1000, 32


def documents(seed: int, count: int, mean: float, masked: bool = False) -> Tokens:
    """Returns random documents; if masked, the first tokens of each are a prompt without loss."""
    g = np.random.default_rng(seed)
    sizes = 1 + g.exponential(mean, count).astype(int)
    starts = np.cumsum(sizes) - sizes
    tokens = g.integers(1, VOCAB, sizes.sum()).astype(np.uint16)
    mask = np.concatenate([np.arange(n) >= g.integers(0, n + 1) for n in sizes]).astype(np.uint8)
    return Tokens("corpus.bin", tokens, starts, mask if masked else None)


def best_fit_by_definition(sizes: list[int], capacity: int) -> list[int]:
    """Places item by item, best-fit decreasing; returns the sorted fill of each row."""
    rows: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [(fill, i) for i, fill in enumerate(rows) if fill + size <= capacity]
        if fitting:
            rows[max(fitting)[1]] += size
        else:
            rows.append(size)
    return sorted(rows)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=120), st.integers(40, 64))
def test_best_fit_equals_its_definition(sizes: list[int], capacity: int) -> None:
    rows = best_fit(np.array(sizes), capacity)
    fill = np.bincount(rows, weights=sizes).astype(int)
    assert sorted(fill.tolist()) == best_fit_by_definition(sizes, capacity)


@pytest.mark.parametrize(("mean", "masked"), [(5, False), (5, True), (30, False), (30, True)])
def test_rows_hold_every_document_once_and_unsplit(mean: float, masked: bool) -> None:
    source = documents(0, 200, mean, masked)
    rows = PackedRows(source, S, VOCAB, shuffle=(1, 0))
    batch = rows.batch(range(rows.rows))
    fragments = []
    filled = 0  # positions that are not padding
    for tokens, labels, positions, numbers in zip(*(f.tolist() for f in batch), strict=True):
        assert numbers == sorted(numbers)
        for number in range(max(numbers) + 1):
            indices = [i for i in range(S) if numbers[i] == number]
            assert [positions[i] for i in indices] == list(range(len(indices)))
            fragment = [(tokens[i], labels[i]) for i in indices]
            if any(token for token, _ in fragment):
                fragments.append(fragment)
                filled += len(indices)
            else:  # padding: the last document of a row, without loss
                assert number == max(numbers)
                assert {label for _, label in fragment} == {-100}
    expected = []
    bounds = [*source.starts.tolist(), len(source.tokens)]
    for begin, end in itertools.pairwise(bounds):
        ids = [int(t) for t in source.tokens[begin:end]]
        mask = [1] * (end - begin) if source.mask is None else source.mask[begin:end].tolist()
        pairs = [(ids[i], ids[i + 1] if mask[i + 1] else -100) for i in range(len(ids) - 1)]
        split = [pairs[i : i + S] for i in range(0, len(pairs), S)]
        if masked and len(pairs) > S:  # an answer is never trained without its prompt
            split = [s for s in split[:1] if any(label != -100 for _, label in s)]
        expected += split
    assert sorted(fragments) == sorted(expected)
    assert rows.padding() == pytest.approx(1 - filled / (rows.rows * S))
    assert f"{rows.padding():.1%} padding" in rows.describe()
    assert ("longer than a row are " + ("cut" if masked else "split") in rows.describe()) == (
        bool((np.diff(bounds) - 1 > S).any())
    )


def test_padding_is_below_one_percent() -> None:
    rows = PackedRows(documents(3, 2000, 60), 512, VOCAB)
    assert rows.padding() < 0.01


def test_order_depends_on_seed_and_index_only_and_resumes(tmp_path: Path) -> None:
    source = documents(0, 300, 10)
    rows = PackedRows(source, S, VOCAB, shuffle=(3, 0))
    batch = rows.batch(range(40))
    by_rank = [
        PackedRows(source, S, VOCAB, shuffle=(3, 0)).batch(range(r, 40, 4)) for r in range(4)
    ]
    for field, rank_fields in zip(batch, zip(*by_rank, strict=True), strict=True):
        assert torch.equal(field, torch.stack(rank_fields, 1).flatten(0, 1))
    other = PackedRows(source, S, VOCAB, shuffle=(4, 0))
    assert not torch.equal(other.batch(range(40)).tokens, batch.tokens)
    n = rows.rows
    epochs = [rows.batch(range(e * n, (e + 1) * n)).tokens.tolist() for e in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    rows.load_state(rows.state())
    with pytest.raises(UserError, match=r"read with data\.packing = 'whole'"):
        IndexedRows(source, S, VOCAB).load_state(rows.state())
    with pytest.raises(UserError, match="token id"):
        PackedRows(source, S, 10).batch([0])
    with pytest.raises(UserError, match="no document that trains anything"):
        PackedRows(Tokens("single", np.array([1]), np.array([0])), S, VOCAB)


def test_a_recipe_selects_packing(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "tokens", np.dtype("<u2")) as writer:
        for size in g.integers(2, 40, 100):
            writer.add(g.integers(1, 200, size))
    path = tmp_path / "recipe.toml"
    path.write_text(f'[[data.sources]]\nformat = "tokens"\npath = "{tmp_path / "tokens"}"\n')
    options = ["data.packing=whole", "train.seq_len=64", "data.validation=0.2"]
    data = open_data(load_recipe(path, options))
    assert isinstance(data.train, PackedRows)
    assert data.validation is not None
    assert "padding" in data.validation.describe()
    assert data.train.batch([0]).documents.max() > 0
    with pytest.raises(RecipeError, match=r"data\.packing = 'whole': a stream's documents"):
        load_recipe(path, [*options, "data.sources.0.format=text", "data.sources.0.stream=true"])
