"""Defaults of the `[model]` table that are formulas of other fields."""

import pytest
from pydantic import ValidationError

from colonnade.models.config import FORMULAS, ModelConfig


@pytest.mark.parametrize("name", FORMULAS)
def test_a_default_follows_the_fields_of_its_formula(name: str) -> None:
    """In a copy with another value of such a field, unless the field was set itself."""
    model, source = ModelConfig(), FORMULAS[name].of
    doubled = {source: 2 * getattr(model, source)}
    default, expected = getattr(model, name), getattr(ModelConfig(**doubled), name)
    assert expected == 2 * default
    assert getattr(model.model_copy(update=doubled), name) == expected
    explicit = ModelConfig(**{name: default})
    assert getattr(explicit.model_copy(update=doubled), name) == default


def test_the_update_of_a_copy_is_validated() -> None:
    with pytest.raises(ValidationError):
        ModelConfig().model_copy(update={"hidden": 0})
    with pytest.raises(ValidationError):
        ModelConfig().model_copy(update={"hiden": 8})
