"""Tokenizers: text round-trips, sizes and byte counts are right, bad files are refused."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from colonnade.launcher.data import Tokenizer, open_tokenizer
from colonnade.launcher.errors import UserError


def texts(count: int = 40) -> list[str]:
    g = random.Random(0)
    alphabet = "abcde  \n\téß漢😀ABC"
    return ["".join(g.choices(alphabet, k=g.randrange(60))) for _ in range(count)]


def train(path: Path, byte_level: bool, special: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    """Trains a small BPE tokenizer on `texts` and writes its tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
        )
        alphabet = []
        special = (*special, *(f"<0x{byte:02X}>" for byte in range(256)))
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts()[:20], trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    config = json.loads(tokenizer.to_str())
    added = config["added_tokens"]  # the trainer marks byte tokens as special: unmark them
    config["added_tokens"] = [t for t in added if not t["content"].startswith("<0x")]
    path.write_text(json.dumps(config))
    return path


def make(kind: str, folder: Path) -> Tokenizer:
    if kind == "bytes":
        return open_tokenizer("bytes")
    return open_tokenizer(str(train(folder / "tokenizer.json", kind == "byte level")))


@pytest.mark.parametrize("kind", ["bytes", "byte level", "sentencepiece"])
def test_text_round_trips_and_every_byte_is_counted(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    samples = texts()
    encoded = tokenizer.encode(samples)
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.size,)
    assert lengths[tokenizer.eod] == 0
    for sample, ids, array in zip(
        samples, encoded, tokenizer.encode_to_arrays(samples), strict=True
    ):
        assert ids == array.tolist()
        assert tokenizer.eod not in ids
        assert tokenizer.decode(ids) == sample
        assert int(lengths[torch.tensor(ids, dtype=torch.long)].sum()) == len(sample.encode())
    assert tokenizer.decode([tokenizer.eod, tokenizer.size + 7]) == ""


def test_byte_tokenizer_is_utf_8() -> None:
    tokenizer = open_tokenizer("bytes")
    assert (tokenizer.size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode(["aé", ""]) == [[97, 195, 169], []]
    assert tokenizer.decode([97, 195, 256, 98]) == "a\ufffdb"


def test_sentencepiece_style_tokens_count_the_bytes_of_their_text(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    vocabulary = {"▁the": 0, "▁": 1, "<0x0A>": 2, "é": 3, "a": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    tokenizer.add_tokens([AddedToken("mañana", special=False)])
    tokenizer.save(str(tmp_path / "t.json"))
    opened = open_tokenizer(str(tmp_path / "t.json"))
    assert (opened.size, opened.eod) == (8, 5)
    assert opened.byte_lengths().tolist() == [4, 1, 1, 2, 1, 0, 0, 7]


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]"])
def test_a_common_name_gives_the_end_of_a_document(end: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(train(tmp_path / "t.json", True, ("<pad>", end))))
    assert tokenizer.eod == 1


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json.*No such file.*give `bytes`"):
        open_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"bad\.json' is not a tokenizer\.json"):
        open_tokenizer(str(tmp_path / "bad.json"))
    train(tmp_path / "endless.json", True, ("<pad>",))
    with pytest.raises(UserError, match=r"no end-of-document token .*set data\.eod to"):
        open_tokenizer(str(tmp_path / "endless.json"))


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    a = train(tmp_path / "a.json", True)
    copy = train(tmp_path / "b.json", True)
    changed = train(tmp_path / "c.json", True, ("<eos>",))
    fingerprints = [open_tokenizer(str(path)).fingerprint for path in (a, copy, changed)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def write_folder(path: Path, files: dict[str, object], special: tuple[str, ...]) -> Path:
    """Writes a folder of tokenizer.json and other files, as published on the hub."""
    path.mkdir()
    train(path / "tokenizer.json", True, special)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


SPECIAL = ("<pad>", "<s>", "<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("files", "eod"),
    [
        ({}, 3),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, 2),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, 2),
        ({"generation_config.json": {"eos_token_id": 2}}, 2),
        ({"generation_config.json": {"eos_token_id": [2, 3]}}, 2),
        ({"special_tokens_map.json": {"eos_token": "<pad>"}}, 0),
        (
            {
                "tokenizer_config.json": {"eos_token": None},
                "generation_config.json": {"eos_token_id": 2},
            },
            2,
        ),
        (
            {
                "tokenizer_config.json": {"eos_token": "<pad>"},
                "generation_config.json": {"eos_token_id": 2},
            },
            0,
        ),
    ],
)
def test_the_files_beside_a_tokenizer_name_the_end_of_a_document(
    files: dict[str, object], eod: int, tmp_path: Path
) -> None:
    path = write_folder(tmp_path / "published", files, SPECIAL)
    for name in (path, path / "tokenizer.json"):
        tokenizer = open_tokenizer(str(name))
        assert (tokenizer.eod, tokenizer.bos) == (eod, None)
    assert open_tokenizer(str(path), eod="<|im_end|>", bos="<s>").eod == 2
    assert open_tokenizer(str(path), eod="<|im_end|>", bos="<s>").bos == 1
    assert open_tokenizer(str(path)).fingerprint == tokenizer.fingerprint


def test_an_end_that_is_not_a_token_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "a", {"tokenizer_config.json": {"eos_token": "<none>"}}, SPECIAL)
    with pytest.raises(UserError, match=r"tokenizer_config\.json names '<none>' .*set data\.eod"):
        open_tokenizer(str(path))
    path = write_folder(
        tmp_path / "b", {"generation_config.json": {"eos_token_id": 10**6}}, SPECIAL
    )
    with pytest.raises(UserError, match=r"generation_config\.json names 1000000"):
        open_tokenizer(str(path))
    (path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not JSON"):
        open_tokenizer(str(path))
    with pytest.raises(UserError, match=r"data\.eod = '<none>': .* no such token"):
        open_tokenizer(str(path), eod="<none>")
    with pytest.raises(UserError, match=r"data\.bos = '<none>': .* no such token"):
        open_tokenizer(str(path), eod="<pad>", bos="<none>")
    with pytest.raises(UserError, match=r"data\.bos = '<s>': the tokenizer `bytes`"):
        open_tokenizer("bytes", bos="<s>")


def models() -> Iterator[Any]:
    """Yields small tokenizers of every model; the vocabularies of some list special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = ["a", "<", "/", "s", ">", "/s>"]
    yield Tokenizer(models.BPE({c: i for i, c in enumerate(["[UNK]", *letters])}, []))
    pieces = [("[UNK]", 0.0), ("</s>", 0.0), *((c, -2.0) for c in letters)]
    yield Tokenizer(models.Unigram(pieces, 0))
    words = ["[UNK]", "</s>", *letters]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    yield tokenizer
    tokenizer = Tokenizer(models.WordPiece({c: i for i, c in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    yield tokenizer


def test_the_spelling_of_a_special_token_is_encoded_as_text(tmp_path: Path) -> None:
    for number, tokenizer in enumerate(models()):
        tokenizer.add_special_tokens(["[UNK]", "</s>"])
        tokenizer.save(str(tmp_path / f"{number}.json"))
        text = "a</s>a </s> a"
        default = open_tokenizer(str(tmp_path / f"{number}.json"))
        [ids] = default.encode([text])
        assert default.eod not in ids
        assert len(ids) >= 4
        allowing = open_tokenizer(str(tmp_path / f"{number}.json"), special_tokens=True)
        assert allowing.encode([text])[0].count(allowing.eod) == 2
        assert default.encoding != allowing.encoding
        # A text without such a spelling is encoded as by the library alone.
        assert default.encode(["a s a"]) == [
            tokenizer.encode("a s a", add_special_tokens=False).ids
        ]


def test_random_texts_with_special_spellings_round_trip(tmp_path: Path) -> None:
    path = train(tmp_path / "t.json", True, ("<|endoftext|>", "<|x|>"))
    tokenizer = open_tokenizer(str(path))
    g = random.Random(1)
    substrings = ["<|endoftext|>", "<|x|>", "<|", "a", " ", "\n", "漢", "|>"]
    samples = ["".join(g.choices(substrings, k=g.randrange(9))) for _ in range(100)]
    for sample, ids in zip(samples, tokenizer.encode(samples), strict=True):
        assert not {0, 1} & set(ids)
        assert tokenizer.decode(ids) == sample


def test_special_spellings_are_encoded_as_by_a_vocabulary_without_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["<|endoftext|> a<|endoftext|>"] * 9, trainer)
    text = "one <|endoftext|> a<|endoftext|>b"
    expected = tokenizer.encode(text).ids
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "t.json"))
    assert open_tokenizer(str(tmp_path / "t.json")).encode([text]) == [expected]
    assert len(expected) < len(text)  # merged within the spelling
