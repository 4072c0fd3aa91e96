"""Dynamic quantisation: published properties of the code, errors, and what must not become zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade.kernels.eight_bit import BLOCK, Coded, code_values


def coded(numbers: Tensor, signed: bool) -> Coded:
    """Encodes numbers."""
    codes = torch.empty(len(numbers), dtype=torch.uint8)
    found = Coded(codes, torch.empty(len(numbers) // BLOCK), signed)
    found.encode(numbers)
    return found


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_has_256_values_up_to_1(signed: bool) -> None:
    values = code_values(signed)
    assert len(values) == 256 - signed
    assert (values.diff() > 0).all()
    assert values.max() == 1.0
    assert 0.0 in values.tolist()
    # the top decade has 64 of the 127 positive values, or 128 without a sign
    assert int((values > 0.1).sum()) == (64 if signed else 129)
    assert not signed or torch.equal(values, -values.flip(0))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), signed=st.booleans(), spread=st.floats(0, 6))
def test_decoding_gives_the_nearest_code_of_each_block(
    seed: int, signed: bool, spread: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(3 * BLOCK, generator=g, dtype=torch.float64)
    numbers *= 10 ** (spread * torch.randn(len(numbers), generator=g, dtype=torch.float64).abs())
    numbers = (numbers if signed else numbers.abs()).float()
    decoded = coded(numbers, signed).decode()
    scales = numbers.view(-1, BLOCK).abs().amax(1, keepdim=True).double()
    allowed = code_values(signed).double()[None, None] * scales[..., None]
    distances = (numbers.view(-1, BLOCK).double()[..., None] - allowed).abs()
    if not signed:  # a positive number does not become 0
        distances[..., 0] = torch.where(numbers.view(-1, BLOCK) > 0, torch.inf, distances[..., 0])
    error = (decoded.view(-1, BLOCK).double() - numbers.view(-1, BLOCK).double()).abs()
    assert (error <= distances.amin(-1) + 1e-6 * scales).all()
    if not signed:
        assert ((decoded > 0) == (numbers > 0)).all()
    assert torch.equal(coded(decoded, signed).decode(), decoded)


def test_zeros_and_numbers_that_are_not_finite() -> None:
    numbers = torch.zeros(3 * BLOCK)
    numbers[BLOCK] = torch.inf
    numbers[2 * BLOCK] = torch.nan
    for signed in (True, False):
        decoded = coded(numbers, signed).decode()
        assert not decoded[:BLOCK].any()
        assert decoded[BLOCK:].isnan().all()


def test_relative_errors_within_a_decade_of_the_largest_number() -> None:
    """Half a step of 0.9 / 64, or 0.9 / 128 without a sign, of a number that is at least 0.1."""
    numbers = torch.rand(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    for signed, most in ((True, 0.08), (False, 0.04)):
        relative = (coded(numbers, signed).decode() / numbers - 1).abs()
        assert relative.max() < most
        assert relative.mean() < most / 3
