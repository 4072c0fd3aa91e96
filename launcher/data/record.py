"""What made a token file: `PREFIX.record.json` beside `.bin` and `.idx`, for people and checks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """Of a token file: its tokenizer, and what it holds."""

    name: str  # of the tokenizer, as it was given
    fingerprint: str  # of the tokenizer, wherever it lies
    vocabulary: int  # largest id of the tokenizer + 1
    eod: int
    bos: int | None
    documents: int
    tokens: int
    largest: int  # id that occurs; -1 if there are no tokens
    content: str  # a hash of tokens, loss mask and documents


def record_file(prefix: Path) -> Path:
    """The record of a prefix."""
    return Path(f"{prefix}.record.json")


def write_record(
    path: Path, tokenizer: Tokenizer, documents: int, tokens: int, largest: int, content: str
) -> None:
    """Writes the record of tokens that `tokenizer` made."""
    record = Record(
        tokenizer.name,
        tokenizer.fingerprint,
        tokenizer.size,
        tokenizer.eod,
        tokenizer.bos,
        documents,
        tokens,
        largest,
        content,
    )
    text = json.dumps({"version": _VERSION, **dataclasses.asdict(record)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def read_record(prefix: Path, tokens: int) -> Record | None:
    """The record of a prefix whose `.idx` lists so many tokens; None if there is none.

    Raises UserError if it cannot be read or belongs to other tokens.
    """
    path = record_file(prefix)
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("version")
        record = Record(**fields)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: make it readable") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no record of tokens ({error}): write the tokens again with `colonnade "
            "data`, or remove it"
        ) from error
    if version != _VERSION or record.tokens != tokens:
        raise UserError(
            f"{path} speaks of {record.tokens} tokens (version {version}), and the files beside it "
            f"hold {tokens}: write the tokens again with `colonnade data`, or remove it"
        )
    return record
