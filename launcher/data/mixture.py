"""The order of samples: a keyed permutation of any size, and the mixture of sources by weight.

Both are closed formulas in the sample index, so that ranks agree without communication, a resumed
run needs no tables, and a corpus of any size takes no memory.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

_MASK_64 = (1 << 64) - 1
_ROUNDS = 4
_FIXED_POINT_ONE = 1 << 32  # fractions are fixed-point numbers with 32 bits


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    """Derives one 64-bit key for each round of the Feistel network."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _scramble(value: int, key: int) -> int:
    """Hashes two 64-bit words to 32 bits: multiplies and folds twice."""
    value = ((value ^ key) * 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 29)) * 0xBF58476D1CE4E5B9) & _MASK_64
    return value >> 32


class Permutation:
    """A keyed permutation of [0, n), computed for one index at a time.

    An unbalanced Feistel network on the grid a × b with a = ceil(sqrt(n)), b = ceil(n / a): each
    round adds a keyed function of one coordinate to the other, modulo its side. The grid has
    fewer than a cells beyond n; an index that maps to one of them is permuted repeatedly until it
    is below n (cycle walking).
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.)
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)

    def __call__(self, index: int, key: tuple[int, ...]) -> int:
        """Permutes `index` under `key` (any integers: a seed, a source, an epoch)."""
        k0, k1, k2, k3 = _round_keys(key)
        a, b = self._a, self._b
        while True:
            left, right = divmod(index, b)
            left = (left + _scramble(right, k0)) % a
            right = (right + _scramble(left, k1)) % b
            left = (left + _scramble(right, k2)) % a
            right = (right + _scramble(left, k3)) % b
            index = left * b + right
            if index < self._n:
                return index


def split_fractions(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the fractions that `locate` takes, times 2^32.

    A source's fraction is its share of the total weight of itself and the sources after it; that of
    the last source is 1.
    """
    remaining = math.fsum(weights)
    fractions = []
    for weight in weights[:-1]:
        fraction = round(weight / remaining * _FIXED_POINT_ONE)
        fractions.append(min(max(fraction, 1), _FIXED_POINT_ONE - 1))
        remaining -= weight
    return (*fractions, _FIXED_POINT_ONE)


def locate(sample: int, fractions: Sequence[int]) -> tuple[int, int]:
    """Returns (source, index within the source) of a sample of the mixture.

    Of the first k samples that reach a source with fraction p / 2^32, it takes floor(k p / 2^32);
    the others are renumbered without gaps and go on to the next source. So every source gets the
    indices 0, 1, 2, … exactly once each.
    """
    for source, fraction in enumerate(fractions):
        taken_before = (sample * fraction) >> 32
        if ((sample + 1) * fraction) >> 32 > taken_before:
            return source, taken_before
        sample -= taken_before
    raise AssertionError("unreachable: the last fraction is 2^32")
