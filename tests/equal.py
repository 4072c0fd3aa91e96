"""Asserts that tensors are equal by the rule of `launcher/verify/equal.py`."""

from collections.abc import Mapping

from torch import Tensor

from colonnade.launcher.verify.equal import EXACT, Bounds, compare


def assert_equal(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    relative: float = EXACT.relative,
    of_all: float = EXACT.of_all,
) -> None:
    """Asserts that every tensor of `a` equals that of `b`; an error names the worst tensor."""
    worst = compare(a, b, Bounds(relative, of_all))[0]
    assert worst.excess <= 1, str(worst)
