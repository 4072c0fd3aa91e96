"""Numbers in 8 bits: dynamic quantisation in blocks (arXiv:2110.02861, sections 2.1 and 2.2).

A block of 256 numbers has one scale, its largest magnitude. Codes stand for fractions of it, from
1e-7 on: the larger a fraction, the more of its bits a code has.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
EXPONENTS = 7  # decades of magnitudes


@functools.cache
def code_values(signed: bool) -> Tensor:
    """Returns the fractions that the codes stand for, ascending, fp32: 256, with signs 255.

    A decade of exponent e has 2ᵉ evenly spaced fractions, twice as many without a sign bit. With
    signs the largest is 1 in place of its mean, in both signs: numbers that were decoded get the
    same codes again.
    """
    values = [0.0] if signed else [0.0, 1.0]
    for exponent in range(EXPONENTS):
        count = 2 ** (exponent + (0 if signed else 1))
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        scale = 10.0 ** (exponent - EXPONENTS + 1)
        means = (scale * (edges[:-1] + edges[1:]) / 2).tolist()
        if signed and exponent == EXPONENTS - 1:
            means[-1] = 1.0
        values += [sign * mean for mean in means for sign in ((-1, 1) if signed else (1,))]
    return torch.tensor(sorted(values), dtype=torch.float64).float()


@functools.cache
def tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the values of the codes, and the boundaries between their neighbours, on a device."""
    values = code_values(signed)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


@dataclass(eq=False)
class Coded:
    """Numbers in 8 bits.

    Attributes:
        codes: uint8 `[N]`, N a multiple of 256.
        scales: fp32 `[N / 256]`.
        signed: whether there are negative ones. Positive numbers stay positive, so that a root of
            them can be divided by.
    """

    codes: Tensor
    scales: Tensor
    signed: bool

    def decode(self) -> Tensor:
        """Returns the numbers, fp32 `[N]`."""
        values, _ = tables(self.signed, self.codes.device)
        blocks = values[self.codes.int()].view(-1, BLOCK)
        return (blocks * self.scales[:, None]).view(-1)

    def encode(self, numbers: Tensor) -> None:
        """Takes the codes nearest to numbers, fp32 `[N]`; NaN and infinity make their block NaN."""
        _, boundaries = tables(self.signed, self.codes.device)
        blocks = numbers.view(-1, BLOCK)
        self.scales.copy_(blocks.abs().amax(1))
        divisors = self.scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(blocks / divisors, boundaries, out_int32=True)
        if not self.signed:
            codes += (codes == 0) & (blocks > 0)
        self.codes.copy_(codes.view(-1))
        self.scales.masked_fill_(self.scales.isinf(), torch.nan)
