"""Prompts: those of a file, and their tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError

JSON_LINES = (".jsonl", ".json", ".ndjson")


def first_tokens(prompt: str, tokenizer: Tokenizer, vocab: int) -> list[int]:
    """Returns the tokens of a prompt, as a document begins.

    Raises:
        UserError: the model lacks one of them.
    """
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    tokens = (begin + tokenizer.encode([prompt])[0]) or [tokenizer.eod]
    require_vocabulary(tokens, vocab, f"the prompt {prompt[:40]!r}")
    return tokens


def require_vocabulary(tokens: Sequence[int], vocab: int, what: str) -> None:
    """Raises UserError if the model lacks one of the tokens of what is named."""
    if (largest := max(tokens)) >= vocab:
        raise UserError(
            f"{what} has the token {largest}, and the model has {vocab} tokens: its tokenizer is "
            "another one; give it as data.tokenizer=..."
        )


def read_prompts(path: str) -> list[str]:
    r"""Reads the prompts of a file: a line each, or the field `prompt` of JSON lines (.jsonl).

    A line of text is taken as it is, without its line break.

    Raises:
        UserError: it cannot be read, has no prompt, or a line is no such object.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompts {path}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompts {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    numbered = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts {path} has no prompt: write one on each line")
    if Path(path).suffix not in JSON_LINES:
        return [line.removesuffix("\r") for _, line in numbered]
    return [prompt_of(line, f"--prompts {path}, line {number}") for number, line in numbered]


def prompt_of(line: str, where: str) -> str:
    """Returns the field `prompt` of a JSON line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f"{where} has no field `prompt` with a text")
    return prompt
