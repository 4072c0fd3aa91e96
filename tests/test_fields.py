"""The reference of fields is the one that the tables make."""

from fields import REFERENCE, reference


def test_the_reference_is_that_of_the_tables() -> None:
    """After a change of a table: python tests/fields.py --write."""
    assert REFERENCE.read_text(encoding="utf-8") == reference()
