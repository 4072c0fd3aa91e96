"""Keyed random numbers: frozen values, SplitMix64 in Python integers, and statistical tests."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from colonnade.kernels.draws import _mixed, draw_integers, draw_normal, draw_uniform, hashed

COUNT = 100_000
MASK = 2**64 - 1


def python_hashed(*keys: int) -> int:
    """`hashed` in Python integers."""

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    state = 0
    for key in keys:
        key = mixed((key + 0x9E3779B97F4A7C15) & MASK)
        state = mixed(((state ^ key) + 0x9E3779B97F4A7C15) & MASK)
    return state - 2**64 if state >= 2**63 else state


def uniform(*keys: int | Tensor) -> Tensor:
    """The hash as a fraction of 2⁶⁴."""
    return hashed(*keys).double() / 2.0**64 + 0.5


def kolmogorov(probabilities: Tensor) -> float:
    """√n · sup |F_n − F| of cumulative probabilities of n draws: above 1.95 in 1 case of 1000."""
    n = len(probabilities)
    step = torch.arange(n, dtype=torch.float64)
    x = probabilities.sort().values
    return math.sqrt(n) * float(torch.maximum(x - step / n, (step + 1) / n - x).max())


def chi_square(counts: Tensor) -> float:
    """χ² of counts that should be equal, in standard deviations from its mean."""
    even = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return (float(((counts - even) ** 2 / even).sum()) - freedom) / math.sqrt(2 * freedom)


def test_splitmix64_as_published() -> None:
    seed = torch.tensor(1234567) + torch.arange(1, 6) * (0x9E3779B97F4A7C15 - 2**64)
    assert [x % 2**64 for x in _mixed(seed).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_equals_python_integers() -> None:
    values = [0, 1, -1, 2, 12345, 2**63 - 1, -(2**63), 2**31, -(2**40)]
    for keys in [(v,) for v in values] + list(itertools.product(values, repeat=2)):
        assert hashed(*keys).item() == python_hashed(*keys)
    first, second = torch.tensor(values), torch.tensor(values)[:, None]
    table = hashed(7, first, second)
    for i, j in itertools.product(range(len(values)), repeat=2):
        assert table[j, i].item() == python_hashed(7, values[i], values[j])


def test_frozen_values() -> None:
    """Values must never change: runs that resume would get other numbers."""
    assert hashed(1, 2, 3).item() == -8634215444751041720
    assert draw_integers(8, 1, 2, torch.arange(10)).tolist() == [0, 4, 2, 4, 0, 1, 4, 3, 4, 5]
    normal = draw_normal(1, 2, torch.arange(4), dtype=torch.float64)
    frozen = [0.928201079, 0.43515414, 0.0302233212, -0.615564406]
    assert normal.tolist() == pytest.approx(frozen, rel=1e-7)


def test_uniform_numbers() -> None:
    drawn = draw_uniform(3, torch.arange(100_000))
    assert drawn.dtype == torch.float64
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert torch.histc(drawn, 10, 0, 1).sub(10_000).abs().max() < 500
    assert draw_uniform(3, 5) == drawn[5]


def test_order_and_number_of_keys_matter() -> None:
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (0, 0, 1), (1, 0, 0)]
    assert len({hashed(*k).item() for k in keys}) == len(keys)


def test_broadcasting_and_independence_of_other_draws() -> None:
    step, layer = torch.arange(5)[:, None], torch.arange(3)
    for draw in (hashed, lambda *k: draw_integers(7, *k), draw_normal):
        table = draw(9, step, layer)
        assert table.shape == (5, 3)
        for s, n in itertools.product(range(5), range(3)):
            assert table[s, n] == draw(9, s, n)
        assert torch.equal(table, draw(9, step.int(), layer.expand(5, 3)))
        before = torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.equal(table, draw(9, step, layer))
        torch.set_rng_state(before)


@pytest.mark.parametrize("key", [0.5, torch.tensor([1.0])])
def test_keys_are_integers(key: float | Tensor) -> None:
    with pytest.raises(TypeError, match="integers"):
        hashed(1, key)


@pytest.mark.parametrize("n", [2, 8, 100])
@pytest.mark.parametrize(
    "keys",
    [
        (torch.arange(COUNT),),
        (torch.arange(COUNT), 3),
        (torch.arange(100), 4, torch.arange(COUNT // 100)[:, None]),
    ],
    ids=["one", "first", "two"],
)
def test_integers_are_uniform(keys: tuple[int | Tensor, ...], n: int) -> None:
    x = draw_integers(n, *keys).flatten()
    assert x.dtype == torch.int64
    assert x.min() >= 0
    assert x.max() < n
    assert abs(chi_square(x.bincount(minlength=n))) < 4
    pairs = x[:-1] * n + x[1:]  # and so are pairs of adjacent ones
    assert abs(chi_square(pairs.bincount(minlength=n * n))) < 4


def test_every_bit_is_fair_and_independent() -> None:
    bits = (hashed(torch.arange(COUNT))[:, None] >> torch.arange(64)) & 1
    signs = 2.0 * bits.double() - 1
    bound = 5 / math.sqrt(COUNT)
    assert signs.mean(0).abs().max() < bound
    assert (signs.T @ signs / COUNT - torch.eye(64)).abs().max() < bound
    assert (signs[:-1].T @ signs[1:] / COUNT).abs().max() < bound  # and between adjacent keys


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bit_of_a_key_flips_half_the_bits(position: int) -> None:
    base = [torch.arange(1000), torch.full((1000,), 5), torch.full((1000,), 2)]
    for bit in range(0, 64, 7):
        other = list(base)
        other[position] = base[position] ^ (1 << bit if bit < 63 else -(2**63))
        changed = (hashed(*base) ^ hashed(*other))[:, None] >> torch.arange(64) & 1
        assert 31 < changed.sum(1).double().mean() < 33


def test_adjacent_keys_are_uncorrelated() -> None:
    x = draw_normal(torch.arange(300)[:, None], torch.arange(301), dtype=torch.float64)
    bound = 4 / math.sqrt(x.numel())
    for down, right in [(0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (7, 3)]:
        a, b = x[down:, right:], x[: 300 - down, : 301 - right]
        assert abs((a * b).mean()) < bound
        assert abs((a.square() * b.square()).mean() - 1) < 4 * bound
    swapped = x[:, :300]
    assert abs((swapped * swapped.T).triu(1).sum() / (300 * 299 / 2)) < 2 * bound


def test_normal_distribution() -> None:
    x = draw_normal(4, torch.arange(COUNT), dtype=torch.float64)
    assert kolmogorov(0.5 * (1 + torch.erf(x / math.sqrt(2)))) < 1.95
    assert kolmogorov(uniform(4, torch.arange(COUNT))) < 1.95
    for power, moment in [(1, 0), (2, 1), (3, 0), (4, 3)]:
        deviation = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)
        assert abs(float((x**power).mean()) - moment) < 4 * deviation / math.sqrt(COUNT)
    integers = draw_integers(1000, 4, torch.arange(COUNT)).double()
    assert abs(torch.corrcoef(torch.stack([x, integers]))[0, 1]) < 4 / math.sqrt(COUNT)


def test_normal_is_the_same_in_every_dtype() -> None:
    keys = (2, torch.arange(1000))
    double = draw_normal(*keys, dtype=torch.float64)
    assert double.dtype == torch.float64
    assert torch.equal(double, draw_normal(*keys).double())
    assert torch.equal(double.bfloat16(), draw_normal(*keys, dtype=torch.bfloat16))
