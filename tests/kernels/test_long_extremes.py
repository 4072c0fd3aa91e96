"""Every chunked mixer in bf16 over 10,000 tokens with extreme inputs, against fp64's recurrence.

The inputs are rounded to their dtype first, so the errors are those of the kernel only. No step
expands the state, so the roundings of S tokens in fp32 lose at most S · 2⁻²⁴ of the largest value,
and gradients, which go through two such chains, twice that; results are rounded once.
"""

import pytest
import torch
import torch.nn.functional as F
from scans import Scan, results
from shown import Row
from torch import Tensor

from colonnade.kernels.delta import delta_rule, delta_rule_recurrence
from colonnade.kernels.s4d import s4d, s4d_recurrence
from colonnade.kernels.selective_scan import selective_scan, selective_scan_recurrence
from colonnade.kernels.ssd import ssd, ssd_recurrence

TABLE = [
    Row(
        "every chunked mixer",
        "bf16 over 10,000 tokens: zeros, one huge value, steps at their limits",
        "token recurrence in fp64",
        "derived bound",
    ),
]

S, HUGE, HUGE_POSITION = 10_000, 1e6, 5_003


def normal(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Standard normal tensors."""
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def mamba2() -> dict[str, Tensor]:
    t = normal(x=(S, 1, 2, 3), dt=(S, 1, 2), A=(2,), B=(S, 1, 1, 4), C=(S, 1, 1, 4), D=(2,))
    return t | {"dt": F.softplus(t["dt"] - 2), "A": -t["A"].exp()}


def mamba1() -> dict[str, Tensor]:
    t = normal(x=(S, 1, 3), dt=(S, 1, 3), A=(3, 4), B=(S, 1, 4), C=(S, 1, 4), D=(3,))
    return t | {"dt": F.softplus(t["dt"] - 2), "A": -t["A"].exp()}


def diagonal() -> dict[str, Tensor]:
    system = dict.fromkeys(("A_real", "A_imag", "C_real", "C_imag"), (3, 4))
    t = normal(x=(S, 1, 3), dt=(3,), **system, D=(3,))
    return t | {"dt": F.softplus(t["dt"] - 2), "A_real": -t["A_real"].exp()}


def delta() -> dict[str, Tensor]:
    t = normal(q=(S, 1, 2, 4), k=(S, 1, 2, 4), v=(S, 1, 2, 3), beta=(S, 1, 2), decay=(S, 1, 2))
    k = F.normalize(t["k"], dim=-1) * (1 - 2**-7)  # so that rounding leaves no norm above 1
    return t | {"k": k, "beta": t["beta"].sigmoid(), "decay": -F.softplus(t["decay"] - 3)}


# the kernel, its recurrence, its inputs; names of the input whose tokens are mixed, of the step,
# and of fp32 inputs
MIXERS: dict[str, tuple[Scan, Scan, dict[str, Tensor], str, str, tuple[str, ...]]] = {
    "M": (ssd, ssd_recurrence, mamba2(), "x", "dt", ("dt", "A", "D")),
    "m": (selective_scan, selective_scan_recurrence, mamba1(), "x", "dt", ("dt", "A", "D")),
    "S": (
        s4d,
        s4d_recurrence,
        diagonal(),
        "x",
        "dt",
        ("dt", "A_real", "A_imag", "C_real", "C_imag", "D"),
    ),
    "G": (delta_rule, delta_rule_recurrence, delta(), "v", "decay", ("beta", "decay")),
}
MIXERS["D"] = (*MIXERS["G"][:2], {k: v for k, v in delta().items() if k != "decay"}, "v", "beta",
               ("beta",))  # fmt: skip

LIMITS = {"dt": (0.0, 1e4), "decay": (0.0, -1e4), "beta": (0.0, 2.0)}


def extreme(inputs: dict[str, Tensor], kind: str, mixed: str, step: str) -> dict[str, Tensor]:
    """The inputs with extreme values of one kind."""
    t = {name: value.clone() for name, value in inputs.items()}
    if kind == "zeros":
        return {
            n: v if n in ("A", "A_real", "dt", "beta", "decay") else v * 0 for n, v in t.items()
        }
    if kind == "one huge value":
        t[mixed][HUGE_POSITION, 0, 0] = HUGE
    else:
        low, high = LIMITS[step]
        t[step][::7], t[step][3::7] = low, high
    return t


def heads_axis(name: str, t: Tensor) -> int:
    """The axis of heads, groups or channels of an argument, a result or a gradient."""
    if name == "state":
        return 1
    return 2 if len(t) == S else 0


def by_kind(values: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Splits heads into those of each kind."""
    chunks = {n: t.chunk(count, heads_axis(n, t)) for n, t in values.items()}
    return [{n: parts[i] for n, parts in chunks.items()} for i in range(count)]


KINDS = ("zeros", "one huge value", "limits")
# All kinds at once, each on heads of its own, but for Mamba-1, whose channels share B and C.
CASES_BY_NAME = [(name, KINDS) for name in MIXERS if name != "m"]
CASES_BY_NAME += [("m", (kind,)) for kind in KINDS]


@pytest.mark.parametrize(("name", "kinds"), CASES_BY_NAME, ids=lambda v: "/".join(v))
def test_bf16_over_10000_tokens_with_extremes(name: str, kinds: tuple[str, ...]) -> None:
    kernel, recurrence, inputs, mixed, step, wide = MIXERS[name]
    of_kinds = [extreme(inputs, kind, mixed, step) for kind in kinds]
    t = {n: torch.cat([one[n] for one in of_kinds], heads_axis(n, v)) for n, v in inputs.items()}
    narrow = {n: v if n in wide else v.bfloat16() for n, v in t.items()}
    got = results(kernel, narrow, chunk=64)
    truth = results(recurrence, {n: v.double() for n, v in narrow.items()})
    assert got["y"].dtype == torch.bfloat16
    count = len(kinds)
    for kind, ours, exact in zip(kinds, by_kind(got, count), by_kind(truth, count), strict=True):
        for key, true in exact.items():
            unit = torch.finfo(ours[key].dtype).eps / 2
            chains = 2 if key.startswith("d") else 1
            bound = unit * true.abs() + chains * S * 2**-24 * true.abs().max()
            assert ours[key].isfinite().all(), (kind, key)
            assert ((ours[key].double() - true).abs() <= bound).all(), (kind, key)
