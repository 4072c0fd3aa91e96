"""docs/recipe.md is up to date with the tables of a recipe."""

from fields import REFERENCE, reference


def test_the_reference_is_up_to_date() -> None:
    """Update it by `python tests/fields.py --write`."""
    assert REFERENCE.read_text(encoding="utf-8") == reference()
