"""Text that is given out while its tokens come, and prompts that are read from files."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from colonnade.launcher.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.generate.prompts import first_tokens, read_prompts
from colonnade.launcher.generate.streaming import TextStream, continuation

TEXTS = ["plain", "naïve café", "日本語のテキスト", "a😀b👩‍👩‍👧c", "Ω≈ç√∫˜µ≤≥÷", "  spaces  kept "]


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    counts = range(1, len(tokens) + 1)
    return [stream.advance(tokens[:n], ended=n == len(tokens)) for n in counts]


def byte_fallback(folder: Path) -> FileTokenizer:
    """A tokenizer in SentencePiece's style, which has bytes for most characters."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = [f"<0x{byte:02X}>" for byte in range(256)] + ["</s>", "▁", "a", "b", "c"]
    model = tokenizers.models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
    tokenizer.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "byte fallback"])
def test_no_character_is_cut(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else byte_fallback(tmp_path)
    tokens = tokenizer.encode([text])[0]
    found = pieces(tokenizer, tokens)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_broken_bytes_do_not_hold_the_text_back() -> None:
    tokens = [0xFF] * 40 + list("é end".encode())
    found = pieces(ByteTokenizer(), tokens)
    assert "".join(found) == "\ufffd" * 40 + "é end"
    assert "".join(found[:20])
    assert pieces(ByteTokenizer(), list("é".encode())[:1]) == ["\ufffd"]


def metaspace(folder: Path) -> FileTokenizer:
    """A tokenizer whose words begin with a space, which decoding drops from the first of a text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["</s>", "<unk>", "▁Here", "▁is", "▁Paris"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder)


def test_a_text_keeps_its_space_behind_the_prompt(tmp_path: Path) -> None:
    tokenizer = metaspace(tmp_path)
    assert tokenizer.decode([3, 4]) == "is Paris"
    stream = TextStream(tokenizer, [2])
    assert [stream.advance([2, 3]), stream.advance([2, 3, 4], True)] == [" is", " Paris"]
    assert continuation(tokenizer, [2], [3, 4]) == " is Paris"


class Halves(ByteTokenizer):
    """Tokens that end one character and begin the next: two bytes each."""

    def decode(self, tokens: Sequence[int]) -> str:
        return super().decode([byte for token in tokens for byte in divmod(token, 256)])


def test_tokens_across_characters_hold_back_no_more_than_one() -> None:
    text = "aあいうえおかきくけこさしすせそたちつてとb" * 2
    data = text.encode() + b" " * (len(text.encode()) % 2)
    tokens = [256 * a + b for a, b in zip(data[::2], data[1::2], strict=True)]
    stream, found = TextStream(Halves()), ""
    for count in range(1, len(tokens) + 1):
        found += stream.advance(tokens[:count])
        assert text.startswith(found) or found == data.decode()
        assert len(data[: 2 * count].decode(errors="ignore")) - len(found) <= 0
    assert found == data.decode()


def test_random_bytes_lose_nothing() -> None:
    rng = random.Random(4)
    for _ in range(200):
        tokens = [rng.choice([0xC3, 0xA9, 0xE2, 0x82, 0xAC, 65, 66]) for _ in range(30)]
        assert "".join(pieces(ByteTokenizer(), tokens)).replace("\ufffd", "") == bytes(
            tokens
        ).decode(errors="replace").replace("\ufffd", "")


def test_prompts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\r\n\n two \nthree", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "o\\nne"}\n\n{"prompt": "", "x": 1}\n')
    assert read_prompts(str(tmp_path / "a.txt")) == ["one", " two ", "three"]
    assert read_prompts(str(tmp_path / "b.jsonl")) == ["o\nne", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "has no prompt: write one on each line"),
        ("a.txt", b"a\xff", "is not UTF-8 text (byte 1); save it as UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n\nx\n', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n', "line 1 has no field `prompt` with a text"),
        ("a.jsonl", b'["prompt"]\n', "line 1 has no field `prompt` with a text"),
    ],
)
def test_faults_of_prompts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(str(tmp_path / name))
    assert str(error.value).startswith(f"--prompts {tmp_path / name}")
    assert message in str(error.value)


def test_a_missing_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read it: No such file"):
        read_prompts(str(tmp_path / "none.txt"))


def test_first_tokens_are_those_of_a_document(tmp_path: Path) -> None:
    assert first_tokens("", ByteTokenizer(), 257) == [256]
    assert first_tokens("é", ByteTokenizer(), 257) == [0xC3, 0xA9]
    with pytest.raises(UserError, match="has the token 195, and the model has 128"):
        first_tokens("é", ByteTokenizer(), 128)
    byte_fallback(tmp_path)
    assert first_tokens("a", FileTokenizer(tmp_path, bos="b"), 300) == [259, 258]
