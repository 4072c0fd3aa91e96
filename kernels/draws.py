"""Counter-based random numbers: a function of integer keys only, equal on all devices and layouts.

A number keyed by (seed, step, layer, group) does not depend on the rank, the time or the other
numbers drawn: there is no generator state, so recomputation and resumption repeat it.
"""

import torch
from torch import Tensor

# SplitMix64's increment and multipliers (Steele, Lea and Flood 2014, Vigna's constants), as int64.
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

# Salts for the two uniform numbers from which a normal one is made.
RADIUS, ANGLE = 0x243F6A8885A308D3, 0x13198A2E03707344


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros shifted in: torch's own shift of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of 64 bits; int64 products wrap around."""
    x = (x ^ _shifted(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shifted(x, 27)) * MULTIPLIERS[1]
    return x ^ _shifted(x, 31)


def hashed(*keys: int | Tensor) -> Tensor:
    """Hashes integer keys to 64 random bits; the keys' order and number matter.

    Args:
        keys: integers in int64's range, or integer tensors; tensors broadcast.

    Returns:
        int64 of the keys' broadcast shape, on the device of the tensors (CPU without any).

    Raises:
        TypeError: a key is not an integer.
    """
    state = torch.tensor(0, device="cpu")
    for key in keys:
        key = key if isinstance(key, Tensor) else torch.tensor(key, device="cpu")
        if key.is_floating_point() or key.is_complex():
            raise TypeError(f"keys of random draws are integers, not {key.dtype}")
        # Mixed before it is combined with the state, or adjacent keys would give sequences that are
        # shifted copies of each other; mixed after it, or the keys would commute.
        state = _mixed((state ^ _mixed(key.long() + INCREMENT)) + INCREMENT)
    return state


def draw_integers(n: int, *keys: int | Tensor) -> Tensor:
    """Uniform integers in [0, n), keyed as in `hashed`; probabilities differ by at most n / 2⁶³.

    Returns:
        int64.
    """
    return _shifted(hashed(*keys), 1) % n


def draw_uniform(*keys: int | Tensor) -> Tensor:
    """Uniform fp64 numbers in [0, 1), keyed as in `hashed`."""
    return _shifted(hashed(*keys), 11).double() * 2.0**-53


def draw_normal(*keys: int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, keyed as in `hashed` (Box and Muller 1958).

    They are rounded to fp32 first, whatever the dtype: so fp32 and fp64 runs get the same noise, as
    do devices whose logarithms differ in the last digit of fp64, except about once in 10⁸ numbers.
    """
    bits = hashed(*keys)
    radius, angle = (_shifted(_mixed(bits ^ salt), 11).double() for salt in (RADIUS, ANGLE))
    length = (-2 * ((radius + 1) * 2.0**-53).log()).sqrt()  # 1 is added, for log 0 is infinite
    return (length * (angle * (2 * torch.pi * 2.0**-53)).cos()).float().to(dtype)
