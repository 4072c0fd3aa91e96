"""`PREFIX.record.json` beside `.bin` and `.idx`: the tokenizer of a token file, and its content."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError

_VERSION = 1
_REMEDY = "write the tokens again with `colonnade data`, or remove it"


@dataclasses.dataclass(frozen=True)
class TokenFileRecord:
    """Describes a token file: the tokenizer that made it, and its content."""

    name: str  # of the tokenizer, as it was given
    fingerprint: str  # of the tokenizer's content, whatever its path
    vocabulary: int  # largest id of the tokenizer + 1
    eod: int
    bos: int | None
    documents: int
    tokens: int
    largest: int  # largest id that occurs; -1 if there are no tokens
    content: str  # a hash of tokens, loss mask and documents
    sampled: str | None = None  # the same of blocks of them, if they are too large to hash whole


class DamagedTokensError(UserError):
    """Reports a file of tokens that is missing or damaged: "PROBLEM: REMEDY"."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)  # both, since errors are pickled with their arguments
        self.problem = problem

    def __str__(self) -> str:
        return ": ".join(self.args)


def record_path(prefix: Path) -> Path:
    """Returns the path of the record of the token file `prefix`."""
    return Path(f"{prefix}.record.json")


def write_record(
    path: Path,
    tokenizer: Tokenizer,
    documents: int,
    tokens: int,
    largest: int,
    content: str,
    sampled: str | None,
) -> None:
    """Writes the record of tokens that `tokenizer` made."""
    record = TokenFileRecord(
        tokenizer.name,
        tokenizer.fingerprint,
        tokenizer.size,
        tokenizer.eod,
        tokenizer.bos,
        documents,
        tokens,
        largest,
        content,
        sampled,
    )
    fields = dataclasses.asdict(record)
    if sampled is None:
        del fields["sampled"]
    text = json.dumps({"version": _VERSION, **fields}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def read_record(prefix: Path, tokens: int) -> TokenFileRecord | None:
    """Reads the record of a token file; returns None if it has none.

    Raises DamagedTokensError if the record cannot be read, or if its number of tokens is not
    `tokens`, the number that the `.idx` lists.
    """
    path = record_path(prefix)
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("version")
        record = TokenFileRecord(**fields)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedTokensError(
            f"cannot read {path}: {error.strerror}", "make it readable"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedTokensError(f"{path} is no record of tokens ({error})", _REMEDY) from error
    if version != _VERSION or record.tokens != tokens:
        raise DamagedTokensError(
            f"{path} describes {record.tokens} tokens (version {version}), and the files beside it "
            f"hold {tokens}",
            _REMEDY,
        )
    return record
