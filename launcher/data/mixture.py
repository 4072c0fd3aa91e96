"""Which row comes when: a keyed permutation of any size, and the split of samples over sources.

Both are closed formulas in the sample index, so that ranks agree without talking, a resumed run
needs no tables, and a corpus of any size costs no memory.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

_WORD = (1 << 64) - 1
_ROUNDS = 4
_ONE = 1 << 32


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _scramble(value: int, key: int) -> int:
    """A well-mixed 32-bit function of two words: multiply and fold, twice."""
    value = ((value ^ key) * 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 29)) * 0xBF58476D1CE4E5B9) & _WORD
    return value >> 32


class Permutation:
    """A keyed permutation of [0, n), computed for one index at a time.

    An unbalanced Feistel network on the grid a × b with a = ceil(sqrt(n)), b = ceil(n / a): each
    round adds a keyed function of one coordinate to the other, modulo its side. The grid has
    fewer than a cells beyond n; what lands there walks on along its cycle until it is inside.
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.)
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)

    def __call__(self, index: int, key: tuple[int, ...]) -> int:
        """Where `index` goes under `key` (any integers: a seed, a source, an epoch)."""
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
    """For each source, its part of the weight that the sources before it left, times 2^32."""
    left = math.fsum(weights)
    fractions = []
    for weight in weights[:-1]:
        fractions.append(min(max(round(weight / left * _ONE), 1), _ONE - 1))
        left -= weight
    return (*fractions, _ONE)


def locate(sample: int, fractions: Sequence[int]) -> tuple[int, int]:
    """(source, index within the source) of a sample of the mixture.

    Of any first k samples a source gets floor(k p / 2^32); the rest is passed on, renumbered
    without gaps, to the sources after it. Every source so sees 0, 1, 2, … once each.
    """
    for source, fraction in enumerate(fractions):
        taken = (sample * fraction) >> 32
        if ((sample + 1) * fraction) >> 32 > taken:
            return source, taken
        sample -= taken
    raise AssertionError("unreachable: the last fraction is 2^32")
