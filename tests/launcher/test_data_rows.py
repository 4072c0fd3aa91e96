"""Rows: boundaries, labels and masks equal a loop over tokens; order and mixtures are exact."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from colonnade.launcher.data import IndexedWriter, open_data
from colonnade.launcher.data.mixture import Permutation, locate, split_fractions
from colonnade.launcher.data.rows import ChainedRows, IndexedRows, MixtureRows, Tokens, slice_rows
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig

VOCAB = 1000


def corpus(seed: int, total: int = 4000, mean: float = 20, masked: bool = False) -> Tokens:
    g = np.random.default_rng(seed)
    tokens = g.integers(0, VOCAB, total).astype(np.uint16)
    inner = g.choice(np.arange(1, total), int(total / mean), replace=False)
    starts = np.concatenate(([0], np.sort(inner)))
    mask = g.integers(0, 2, total).astype(np.uint8) if masked else None
    return Tokens("corpus.bin", tokens, starts, mask)


def row_by_loop(source: Tokens, offset: int, seq_len: int) -> list[list[int]]:
    """Computes the four fields of one row token by token, straight from their definition."""
    begins = set(source.starts.tolist())
    columns: list[list[int]] = [[], [], [], []]
    position = document = 0
    for t in range(offset, offset + seq_len):
        if t in begins and t > offset:
            position, document = 0, document + 1
        loss = t + 1 not in begins and (source.mask is None or source.mask[t + 1] == 1)
        row = (source.tokens[t], source.tokens[t + 1] if loss else -100, position, document)
        for column, value in zip(columns, row, strict=True):
            column.append(int(value))
        position += 1
    return columns


@pytest.mark.parametrize("seq_len", [1, 7, 64])
@pytest.mark.parametrize(("mean", "masked"), [(1.2, False), (20, True), (3000, False)])
def test_rows_equal_a_loop_over_tokens(seq_len: int, mean: float, masked: bool) -> None:
    source = corpus(seq_len, mean=mean, masked=masked)
    g = np.random.default_rng(1)
    offsets = [0, 4000 - seq_len - 1, *g.integers(0, 4000 - seq_len, 12).tolist()]
    offsets += [max(int(start) - seq_len, 0) for start in source.starts[:5]]  # start ends the row
    batch = slice_rows(source, offsets, seq_len, VOCAB)
    expected = torch.tensor([row_by_loop(source, o, seq_len) for o in offsets], dtype=torch.int32)
    for i, field in enumerate(batch):
        assert field.dtype == torch.int32
        assert field.is_contiguous()
        torch.testing.assert_close(field, expected[:, i], rtol=0, atol=0)


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order() -> None:
    source = corpus(0)
    S = 16
    rows = IndexedRows(source, S, VOCAB, shuffle=(3, 0))
    n = rows.rows
    assert n == (4000 - 1) // S
    firsts = slice_rows(source, [j * S for j in range(n)], S, VOCAB).tokens
    epochs = [rows.batch(range(e * n, (e + 1) * n)).tokens for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(firsts.tolist())
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], firsts)


def test_order_depends_on_seed_and_source_but_not_on_the_batches() -> None:
    source = corpus(0)
    rows = IndexedRows(source, 16, VOCAB, shuffle=(3, 0))
    batch = rows.batch(range(40))
    by_rank = [rows.batch(range(rank, 40, 4)) for rank in range(4)]
    for field, rank_fields in zip(batch, zip(*by_rank, strict=True), strict=True):
        assert torch.equal(field, torch.stack(rank_fields, 1).flatten(0, 1))
    for shuffle in ((4, 0), (3, 1)):
        other = IndexedRows(source, 16, VOCAB, shuffle=shuffle).batch(range(40))
        assert not torch.equal(other.tokens, batch.tokens)


def test_without_shuffle_rows_are_in_file_order_of_their_token_range() -> None:
    source = corpus(0)
    rows = IndexedRows(source, 16, VOCAB, token_range=(100, 300))
    assert rows.rows == 199 // 16
    assert rows.batch([0, 1]).tokens.flatten().tolist() == source.tokens[100:132].tolist()
    assert torch.equal(rows.batch([rows.rows]).tokens, rows.batch([0]).tokens)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101, 1024, 5000])
def test_permutation_is_a_bijection(n: int) -> None:
    permutation = Permutation(n)
    for key in ((0, 0, 0), (7, 1, 2)):
        assert sorted(permutation(i, key) for i in range(n)) == list(range(n))


def test_permutation_looks_random_and_works_beyond_32_bits() -> None:
    n = 5000
    permutation = Permutation(n)
    images = np.array([permutation(i, (0, 0, 0)) for i in range(n)])
    # Random images have correlation 0 ± 1/sqrt(n), mean distance n / 3 and one fixed point.
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 5 / n**0.5
    assert abs(np.corrcoef(images[1:], images[:-1])[0, 1]) < 5 / n**0.5
    assert abs(np.abs(images - np.arange(n)).mean() / n - 1 / 3) < 0.02
    assert (images == np.arange(n)).sum() < 10
    keys = [permutation(17, (seed, 0, 0)) for seed in range(1000)]
    counts = np.bincount(np.array(keys) * 10 // n, minlength=10)
    assert counts.min() > 60
    huge = 10**15
    images = np.array([Permutation(huge)(i, (0, 0, 0)) for i in range(100)])
    assert 0 <= images.min() < huge / 10 < huge * 9 / 10 < images.max() < huge


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.2, 0.1], [5, 1e-3, 2, 3], [1e-12, 1]])
def test_mixture_is_exact_and_yields_every_index_of_a_source_once(weights: list[float]) -> None:
    fractions = split_fractions(weights)
    samples = 20000
    located = [locate(k, fractions) for k in range(samples)]
    counts = Counter(source for source, _ in located)
    for source, weight in enumerate(weights):
        indices = [index for s, index in located if s == source]
        assert indices == list(range(len(indices)))
        assert abs(counts[source] - samples * weight / sum(weights)) <= len(weights)
    # At an index where a floating-point count would be inexact.
    source, index = locate(10**15, fractions)
    assert abs(index - 10**15 * weights[source] / sum(weights)) < 10**15 * 2.0**-31 * len(weights)


def test_mixture_reads_the_rows_that_locate_names() -> None:
    sources = [IndexedRows(corpus(i), 16, VOCAB, shuffle=(0, i)) for i in range(3)]
    weights = [0.5, 0.2, 0.3]
    mixture = MixtureRows(sources, weights)
    samples = [40, 3, 17, 18, 900, 5, 5]
    batch = mixture.batch(samples)
    for row, sample in enumerate(samples):
        source, index = locate(sample, split_fractions(weights))
        for field, single in zip(batch, sources[source].batch([index]), strict=True):
            assert torch.equal(field[row], single[0])
    assert mixture.rows == sum(s.rows for s in sources)
    assert "50.00%" in mixture.describe()


def test_chain_reads_one_source_after_the_other() -> None:
    sources = [IndexedRows(corpus(i, total=200), 16, VOCAB) for i in range(2)]
    chain = ChainedRows(sources)
    n = sources[0].rows
    assert chain.rows == 2 * n
    expected = torch.cat([s.batch(range(n)).tokens for s in sources])
    assert torch.equal(chain.batch(range(2 * n)).tokens, expected)
    assert torch.equal(chain.batch([2 * n]).tokens, expected[:1])


def test_a_state_of_other_data_is_refused() -> None:
    rows = [IndexedRows(corpus(i, total=t), 16, VOCAB) for i, t in enumerate((200, 300))]
    rows[0].load_state(rows[0].state())
    with pytest.raises(UserError, match="gives 18 rows, but 12 when the run was saved"):
        rows[1].load_state(rows[0].state())
    with pytest.raises(UserError, match=r"1 data sources and data\.sources has 2"):
        MixtureRows(rows, [1, 1]).load_state(rows[0].state())
    MixtureRows(rows, [1, 1]).load_state(MixtureRows(rows, [1, 1]).state())


def test_a_token_beyond_the_vocabulary_is_named() -> None:
    source = corpus(0)
    source.tokens[16] = 1234
    rows = IndexedRows(source, 16, VOCAB)
    with pytest.raises(UserError, match=r"corpus\.bin holds the token id 1234, but model\.vocab"):
        rows.batch([0])  # 1234 is the last label only
    rows.batch([2])
    signed = Tokens("old.bin", np.array([1, -5, 3, 4]), np.array([0]))
    with pytest.raises(UserError, match=r"old\.bin holds the negative token id -5"):
        IndexedRows(signed, 2, VOCAB).batch([0])
    wide = Tokens("wide.bin", np.array([1, 2**32 + 1, 3, 4]), np.array([0]))
    with pytest.raises(UserError, match="token id 4294967297"):
        IndexedRows(wide, 2, VOCAB).batch([0])


def test_a_corpus_too_short_for_a_row_is_refused() -> None:
    source = corpus(0, total=20)
    assert IndexedRows(source, 19, VOCAB).rows == 1
    with pytest.raises(UserError, match=r"20 tokens, too few .* train\.seq_len = 19 or less"):
        IndexedRows(source, 20, VOCAB)
    with pytest.raises(UserError, match="empty corpus"):
        IndexedRows(Tokens("e", np.empty(0, np.uint16), np.empty(0, np.int64)), 20, VOCAB)


def tokens_recipe(prefix: Path, seq_len: int, validation: float) -> Recipe:
    return Recipe(
        data=DataConfig(
            sources=(SourceConfig(format="tokens", path=str(prefix)),), validation=validation
        ),
        train=TrainConfig(seq_len=seq_len),
    )


def test_token_files_hold_out_their_last_documents(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    documents = [g.integers(0, 256, 10).astype(np.uint16) for _ in range(100)]
    with IndexedWriter(tmp_path / "d", np.dtype("<u2")) as writer:
        for document in documents:
            writer.add(document)
    data = open_data(tokens_recipe(tmp_path / "d", 8, 0.1))
    assert data.validation is not None
    assert (data.train.rows, data.validation.rows) == (899 // 8, 99 // 8)
    assert data.validation.batch([0]).tokens[0].tolist() == documents[90][:8].tolist()
    # A validation row needs more documents than data.validation holds out.
    data = open_data(tokens_recipe(tmp_path / "d", 200, 0.1))
    assert data.validation is not None
    assert (data.train.rows, data.validation.rows) == (789 // 200, 1)
    # No validation: too few tokens for a row of each, and validation turned off.
    assert open_data(tokens_recipe(tmp_path / "d", 600, 0.1)).validation is None
    data = open_data(tokens_recipe(tmp_path / "d", 8, 0.0))
    assert data.validation is None
    assert data.train.rows == 999 // 8
