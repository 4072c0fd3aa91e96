"""The README's table is the one that the tests' parameter lists make."""

from shown import README, in_readme, shown, table

from colonnade.models.config import SYMBOLS


def test_the_table_is_the_tests() -> None:
    """After a change of a list: python tests/shown.py --write."""
    text = README.read_text(encoding="utf-8")
    assert in_readme(text, table()) == text


def test_every_symbol_is_in_it() -> None:
    rows = [row for row in shown() if not any(c.islower() for c in row.symbols[1:])]
    assert set(SYMBOLS) <= {symbol for row in rows for symbol in row.symbols}
