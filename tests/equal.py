"""Assertions by the rule that says what "equal" is."""

from collections.abc import Mapping

from torch import Tensor

from colonnade.launcher.verify.equal import EXACT, Bounds, compare


def assert_equal(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    relative: float = EXACT.relative,
    of_all: float = EXACT.of_all,
) -> None:
    """Every tensor of `a` equals that of `b`; the worst one is named."""
    worst = compare(a, b, Bounds(relative, of_all))[0]
    assert worst.excess <= 1, str(worst)
