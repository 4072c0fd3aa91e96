"""Errors that a user can fix: one readable message, exit status 2, never a traceback."""

from dataclasses import dataclass


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do."""


class ReportedError(Exception):
    """Ends a rank after the cause was printed, by this rank or another one.

    Attributes:
        status: the exit status.
        cause: that was printed, in one line.
    """

    def __init__(self, status: int, cause: str) -> None:
        super().__init__(cause)
        self.status, self.cause = status, cause


@dataclass(frozen=True)
class Fault:
    """One mistake in a recipe: the dotted field, its value as given, and the remedy."""

    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.remedy}"


class RecipeError(UserError):
    """Reports all faults of a recipe in one message."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        count = "1 mistake" if len(faults) == 1 else f"{len(faults)} mistakes"
        super().__init__("\n".join([f"the recipe has {count}:", *(f"  {f}" for f in faults)]))

    def __reduce__(self) -> tuple[type, tuple[list[Fault]]]:
        """Pickles only the faults, since ranks send this error to each other as an object."""
        return RecipeError, (self.faults,)
