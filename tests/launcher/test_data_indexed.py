"""Token files: megatron-core reads ours, we read its files, and damaged files are refused."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from colonnade.launcher.data import IndexedWriter, read_indexed
from colonnade.launcher.data.indexed import token_dtype
from colonnade.launcher.errors import UserError

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]


def documents(dtype: type, count: int = 30) -> list[np.ndarray]:
    g = np.random.default_rng(0)
    info = np.iinfo(dtype)
    return [
        g.integers(info.min, info.max, int(n), dtype=dtype, endpoint=True)
        for n in g.integers(1, 50, count)
    ]


def write(prefix: Path, texts: list[np.ndarray], **options: bool) -> None:
    with IndexedWriter(prefix, texts[0].dtype, **options) as writer:
        for text in texts:
            writer.add(text)


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_our_files(tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    texts = documents(dtype)
    write(tmp_path / "corpus.v1", texts)
    dataset = IndexedDataset(str(tmp_path / "corpus.v1"))
    assert len(dataset) == len(texts)
    assert dataset.index.dtype == dtype
    assert dataset.document_indices.tolist() == list(range(len(texts) + 1))
    for read, text in zip(dataset, texts, strict=True):
        assert np.array_equal(read, text)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [1, 3])
def test_we_read_megatrons_files(tmp_path: Path, dtype: type, sequences: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    texts = documents(dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype)
    for i in range(0, len(texts), sequences):
        group = texts[i : i + sequences]
        document = torch.from_numpy(np.concatenate(group).astype(np.int64))
        builder.add_document(document, [len(sequence) for sequence in group])
    builder.finalize(str(tmp_path / "megatron.idx"))
    tokens = read_indexed(tmp_path / "megatron")
    assert tokens.tokens.dtype == dtype
    assert np.array_equal(tokens.tokens, np.concatenate(texts))
    sizes = [len(text) for text in texts]
    assert tokens.starts.tolist() == np.cumsum([0, *sizes])[:-1:sequences].tolist()
    assert tokens.mask is None


def test_documents_without_tokens_have_no_start(tmp_path: Path) -> None:
    texts = [np.arange(n, dtype=np.int32) for n in (0, 3, 0, 0, 2, 0)]
    write(tmp_path / "d", texts)
    assert read_indexed(tmp_path / "d").starts.tolist() == [0, 3]
    write(tmp_path / "e", texts[:1])
    assert len(read_indexed(tmp_path / "e").tokens) == 0


def test_masks_are_written_beside_the_tokens(tmp_path: Path) -> None:
    texts = documents(np.uint16, 3)
    g = np.random.default_rng(1)
    masks = [g.integers(0, 2, len(text)).astype(np.uint8) for text in texts[:2]]
    with IndexedWriter(tmp_path / "d", np.dtype("<u2"), masked=True) as writer:
        for text, mask in zip(texts, [*masks, None], strict=True):
            writer.add(text, mask)
    mask = read_indexed(tmp_path / "d").mask
    assert mask is not None
    assert np.array_equal(mask, np.concatenate([*masks, np.ones(len(texts[2]), np.uint8)]))
    write(tmp_path / "d", texts)
    assert read_indexed(tmp_path / "d").mask is None


def test_a_failed_write_leaves_the_old_files(tmp_path: Path) -> None:
    texts = documents(np.uint16)
    write(tmp_path / "d", texts)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted() -> None:
        with IndexedWriter(tmp_path / "d", np.dtype("<u2"), masked=True) as writer:
            writer.add(texts[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ids_take_two_bytes_if_they_fit() -> None:
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.int32


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write(tmp_path / "d", documents(np.uint16), masked=True)
    return tmp_path / "d"


@pytest.mark.parametrize("keep", [0, 5, 20, 33, 34, 100, -8, -1])
def test_a_truncated_index_is_refused(written: Path, keep: int) -> None:
    path = written.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"d\.idx is (truncated|not a Megatron).*copy the file"):
        read_indexed(written)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"PK", r"d\.idx is not a Megatron \.idx file"),
        (9, b"\2", r"d\.idx has the version 2"),
        (17, b"\6", r"d\.idx has the dtype code 6, not an integer"),
        (18, b"\xff" * 8, r"d\.idx is truncated"),
        (34, struct.pack("<i", 70), "without gaps"),
        (34, struct.pack("<i", -1), "without gaps"),
        (-8, struct.pack("<q", 29), "document bounds that do not cover 30"),
        (-16, struct.pack("<q", 99), "document bounds that do not cover 30"),
    ],
)
def test_a_damaged_index_is_refused(written: Path, offset: int, value: bytes, message: str) -> None:
    path = written.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    offset %= len(content)
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_indexed(written)


def test_tokens_and_masks_that_do_not_match_the_index_are_refused(written: Path) -> None:
    for ending, fault in ((".bin", "bytes where d.idx lists"), (".mask", "bytes for")):
        path = written.with_suffix(ending)
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(UserError, match=rf"d\{ending} has {len(content) - 1} {fault}"):
            read_indexed(written)
        path.write_bytes(content)
    read_indexed(written)


@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_a_missing_file_is_named(written: Path, ending: str) -> None:
    written.with_suffix(ending).unlink()
    with pytest.raises(UserError, match=rf"cannot read .*d\{ending}: No such file"):
        read_indexed(written)


def test_a_file_truncated_after_it_was_opened_is_named(written: Path) -> None:
    opened = read_indexed(written)
    tokens = opened.tokens.tolist()
    path = written.with_suffix(".bin")
    os.truncate(path, 20)
    assert opened.tokens[:10].tolist() == tokens[:10]
    with pytest.raises(
        UserError, match=rf"d\.bin was cut short .* holds 20 bytes of {2 * len(tokens)}"
    ):
        opened.tokens[5:11]
    assert opened.mask is not None
    written.with_suffix(".mask").unlink()  # it stays open
    assert opened.mask.tolist() == [1] * len(tokens)
