"""Masks what may be a secret in the words of a command line, so that it can be recorded.

It masks too much rather than too little: passwords have no form by which they could be told.
"""

import re
from collections.abc import Iterator, Sequence

MASK = "***"
# A name with one of these words names a secret: `db_password`, `hf-token`, `SLURM_JWT`.
SECRET_WORDS = {
    "password", "passwd", "passphrase", "pass", "pw", "pwd", "secret", "secrets", "token", "jwt",
    "apikey", "credential", "credentials", "cookie", "bearer", "authorization",
}  # fmt: skip
# A name that ends in one of these does, too, unless the value is a number: `api_key`, not
# `model.delta_key_dim`; `--tokens x`, not `--tokens 100`.
LAST_WORDS = {"key", "keys", "tokens", "auth", "sig", "signature"}
# The beginning of `name=value` and of `name: value`
ASSIGNED = re.compile(r"([\w.-]+)[\"']?\s*[=:]\s*")
# What begins like the tokens of well-known services, or like a JSON web token
TOKEN = re.compile(
    r"\b(hf_|gh[opsur]_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA|ASIA|eyJ|ya29\.)[\w.~+/=-]{6,}"
)
USER = re.compile(r"(\w://)[^/\s]+@")  # user and password in a URL
RANDOM = re.compile(r"(?<![\w+/=-])(?=[\w+=]*\d)(?=[\w+=]*[A-Za-z])[\w+=]{24,}(?![\w+/=-])")


def masked(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line with what may be a secret replaced by `***`.

    Masked are values of names such as `password` and `token`, user and password of URLs, words that
    look like the tokens of well-known services, and long words of letters and digits.
    """
    return list(_masked(words))


def _masked(words: Sequence[str]) -> Iterator[str]:
    """Yields the words of `masked`."""
    option = ""  # whose value the word may be
    for word in words:
        yield MASK if option and names_secret(option, word) else masked_text(word)
        option = word if word.startswith("-") and "=" not in word else ""


def masked_text(text: str) -> str:
    """Returns a text with what may be a secret replaced by `***`."""

    text = USER.sub(rf"\1{MASK}@", text)
    for found in ASSIGNED.finditer(text):
        if names_secret(found[1], text[found.end() :]):
            text = text[: found.end()] + MASK  # to its end: no form tells where a value ends
            break
    return RANDOM.sub(MASK, TOKEN.sub(MASK, text))


def names_secret(name: str, value: str) -> bool:
    """Returns whether the value of a name may be a secret."""
    words = re.split(r"[\W_]+", name.lower())
    if SECRET_WORDS.intersection(words):
        return True
    return words[-1] in LAST_WORDS and re.fullmatch(r"[\d.e+-]{1,12}", value) is None
