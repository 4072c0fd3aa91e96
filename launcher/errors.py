"""Mistakes a user can mend: one readable message, exit status 2, never a traceback."""

from dataclasses import dataclass


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do."""


@dataclass(frozen=True)
class Fault:
    """One mistake in a recipe: the dotted field, its value as given, and the remedy."""

    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.remedy}"


class RecipeError(UserError):
    """All faults of a recipe at once."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        many = "1 mistake" if len(faults) == 1 else f"{len(faults)} mistakes"
        super().__init__("\n".join([f"the recipe has {many}:", *(f"  {f}" for f in faults)]))

    def __reduce__(self) -> tuple[type, tuple[list[Fault]]]:
        """Ranks send it to each other: it is made anew from its faults."""
        return RecipeError, (self.faults,)
