"""Sequences cut into segments that run at once, against the token recurrence over the whole row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from scans import Scan, call
from shown import Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from colonnade.kernels.delta import delta_rule, delta_rule_recurrence
from colonnade.kernels.s4d import s4d, s4d_recurrence
from colonnade.kernels.segments import Here, Wait, grads_after, states_before
from colonnade.kernels.selective_scan import selective_scan, selective_scan_recurrence
from colonnade.kernels.ssd import ssd, ssd_recurrence

TABLE = [
    Row(s, "1 to 8 segments at once, documents across them", "token recurrence") for s in "MmSDG"
]

KERNELS: dict[str, tuple[Scan, Scan]] = {
    "M": (ssd, ssd_recurrence),
    "m": (selective_scan, selective_scan_recurrence),
    "S": (s4d, s4d_recurrence),
    "D": (delta_rule, delta_rule_recurrence),
    "G": (delta_rule, delta_rule_recurrence),
}
WIDE = ("dt", "A", "A_real", "A_imag", "C_real", "C_imag", "D", "beta", "decay")  # fp32 beside bf16


def inputs(name: str, S: int, B: int = 2) -> dict[str, Tensor]:
    """Random fp64 arguments; two heads share what can be shared."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    if name == "M":
        shapes = {"x": (S, B, 4, 3), "dt": (S, B, 4), "A": (4,), "D": (4,)}
        shapes |= dict.fromkeys("BC", (S, B, 2, 5))
    elif name == "m":
        shapes = {"x": (S, B, 3), "dt": (S, B, 3), "A": (3, 4), "D": (3,)}
        shapes |= dict.fromkeys("BC", (S, B, 4))
    elif name == "S":
        shapes = {"x": (S, B, 3), "dt": (3,), "D": (3,)}
        shapes |= dict.fromkeys(("A_real", "A_imag", "C_real", "C_imag"), (3, 4))
    else:
        shapes = dict.fromkeys("qk", (S, B, 2, 5)) | {"v": (S, B, 4, 3), "beta": (S, B, 4)}
        shapes |= {"decay": (S, B, 4)} if name == "G" else {}
    t = {key: normal(*shape) for key, shape in shapes.items()}
    limits: dict[str, Callable[[Tensor], Tensor]] = {
        "dt": lambda v: F.softplus(v - 3),
        "A": lambda v: -v.exp(),
        "A_real": lambda v: -v.exp(),
        "k": lambda v: F.normalize(v, dim=-1),
        "beta": lambda v: 2 * v.sigmoid(),
        "decay": lambda v: F.logsigmoid(v + 3),
    }
    return {key: limits[key](v) if key in limits else v for key, v in t.items()}


def rows(length: int, parts: int, B: int) -> Tensor:
    """Documents `[S, B]`: bounds in segments and between them, one over three segments and more."""
    S = length * parts
    bounds = [(3, length, 4 * length + 2), (length - 1, 2 * length, 2 * length + 1, S - 1)]
    at = torch.arange(S)
    return torch.stack([sum((at >= b).int() for b in bounds[row]) for row in range(B)], 1)


def numbered_locally(documents: Tensor, parts: int) -> Tensor:
    """The same, every segment's from 0: their numbers say nothing of each other."""
    segments = documents.unflatten(0, (parts, -1))
    return (segments - segments[:, :1]).flatten(0, 1)


def outcome(scan: Scan, t: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Outputs, and gradients of a random function of them, the same in every dtype."""
    t = {key: v.detach().requires_grad_() for key, v in t.items()}
    y, _ = call(scan, t, **options)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g).bfloat16().to(y.dtype)
    gradients = torch.autograd.grad(y, list(t.values()), dy)
    return {"y": y.detach()} | {f"d{k}": v for k, v in zip(t, gradients, strict=True)}


@pytest.mark.parametrize(("length", "chunk", "B"), [(11, 4, 2), (12, 5, 1), (10, 5, 2), (4, 64, 2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("name", KERNELS)
def test_equals_recurrence(
    name: str, parts: int, packed: bool, length: int, chunk: int, B: int
) -> None:
    kernel, recurrence = KERNELS[name]
    t = inputs(name, parts * length, B)
    ids = rows(length, parts, B) if packed else None
    local = None if ids is None else numbered_locally(ids, parts)
    got = outcome(kernel, t, chunk=chunk, documents=local, passing=Here(parts, ids))
    assert_equal(got, outcome(recurrence, t, documents=ids), of_all=0)


@pytest.mark.parametrize("name", KERNELS)
def test_states_after_each_segment(name: str) -> None:
    kernel, recurrence = KERNELS[name]
    t, ids = inputs(name, 44), rows(11, 4, 2)
    t = {key: v.requires_grad_() for key, v in t.items()}
    _, states = call(kernel, t, chunk=4, documents=ids, passing=Here(4, ids))
    assert not states.requires_grad
    for j, state in enumerate(states):
        end = 11 * (j + 1)
        until = {key: v[:end] if len(v) == 44 else v for key, v in t.items()}
        _, expected = call(recurrence, until, documents=ids[:end])
        assert_equal({"state": state}, {"state": expected.detach()}, of_all=0)


class Recorded(Here):
    """Notes what is called and given, and that the kernel leaves it as it is until it waits."""

    def __init__(self, parts: int, documents: Tensor | None = None) -> None:
        super().__init__(parts, documents)
        self.events: list[str] = []
        self.given: dict[str, tuple[Tensor, ...]] = {}
        self.returned: dict[str, Tensor] = {}

    def record(self, name: str, wait: Wait, *given: Tensor) -> Wait:
        self.events.append(name)
        self.given[name] = copies = tuple(t.clone() for t in given)

        def waited() -> Tensor:
            self.events.append(f"{name} waited")
            assert all(torch.equal(a, b) for a, b in zip(copies, given, strict=True))
            self.returned[name] = wait()
            return self.returned[name].clone()

        return waited

    def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Wait:
        wait = super().launch(state, transition, matrix)
        return self.record("launch", wait, state, transition)

    def launch_back(self, grad: Tensor, transition: Tensor, matrix: bool) -> Wait:
        wait = super().launch_back(grad, transition, matrix)
        return self.record("launch_back", wait, grad, transition)


class Products(TorchDispatchMode):
    """Notes matrix products among the events."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "bmm" in func.__name__:
            self.events.append("product")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KERNELS)
def test_each_exchange_is_launched_once_and_hides_behind_products(name: str) -> None:
    passing = Recorded(2)
    with Products(passing.events):
        outcome(KERNELS[name][0], inputs(name, 24), chunk=4, passing=passing)
    exchanges = [e for e in passing.events if e != "product"]
    assert exchanges == ["launch", "launch waited", "launch_back", "launch_back waited"]
    for direction in ("launch", "launch_back"):
        start, stop = (passing.events.index(e) for e in (direction, f"{direction} waited"))
        assert name in "mS" or "product" in passing.events[start:stop]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", KERNELS)
def test_segments_that_are_no_neighbours(name: str, rank: int) -> None:
    """A rank of a zigzag over two sends its share of what all segments send, and gets its own."""
    kernel, _ = KERNELS[name]
    t, ids, here = inputs(name, 44), rows(11, 4, 2), [rank, 3 - rank]

    def mine(v: Tensor) -> Tensor:
        return v.unflatten(0, (4, 11))[here].flatten(0, 1) if len(v) == 44 else v

    def weighted(passing: Here, t: dict[str, Tensor], ids: Tensor, dy: Tensor) -> dict[str, Tensor]:
        t = {key: v.requires_grad_() for key, v in t.items()}
        y, states = call(kernel, t, chunk=4, documents=ids, passing=passing)
        gradients = torch.autograd.grad(y, list(t.values()), dy)
        return {"y": y, "states": states} | dict(zip(t, gradients, strict=True))

    class Rank(Recorded):
        """Gets what all segments together were given."""

        def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Wait:
            return self.record("launch", lambda: every.returned["launch"][here], state, transition)

        def launch_back(self, grad: Tensor, transition: Tensor, matrix: bool) -> Wait:
            after = every.returned["launch_back"]
            return self.record("launch_back", lambda: after[here], grad, transition)

    every, alone = Recorded(4, ids), Rank(2)
    dy = torch.randn(call(kernel, t, chunk=4)[0].shape, dtype=torch.float64)
    whole = weighted(every, t, ids, dy)
    got = weighted(alone, {key: mine(v.detach()) for key, v in t.items()}, mine(ids), mine(dy))
    for key, v in whole.items():
        if key == "states" or len(v) == 44:  # other gradients are sums over the ranks
            expected = v[here] if key == "states" else mine(v)
            assert_equal({key: got[key]}, {key: expected}, of_all=0)
    for direction, sent in alone.given.items():
        for a, b in zip(sent, every.given[direction], strict=True):
            assert_equal({direction: a}, {direction: b[here]}, of_all=0)


@pytest.mark.parametrize("name", KERNELS)
def test_bf16(name: str) -> None:
    """Inputs rounded to the dtype, then fp64 as the truth: what is lost is the kernel's own."""
    kernel, recurrence = KERNELS[name]
    t, ids = inputs(name, 88), rows(22, 4, 2)
    if "k" in t:
        t["k"] *= 1 - 2**-7  # so that rounding leaves no norm above 1
    narrow = {k: v.to(torch.float32 if k in WIDE else torch.bfloat16) for k, v in t.items()}
    passing = Recorded(4, ids)
    got = outcome(kernel, narrow, chunk=8, documents=ids, passing=passing)
    assert got["y"].dtype == torch.bfloat16
    assert all(got[f"d{k}"].dtype == v.dtype for k, v in narrow.items())
    assert all(v.dtype == torch.float32 for sent in passing.given.values() for v in sent)
    expected = outcome(recurrence, {k: v.double() for k, v in narrow.items()}, documents=ids)
    for key, v in got.items():
        bound = 1e-2 if v.dtype == torch.bfloat16 else 1e-4
        assert_equal({key: v}, {key: expected[key]}, relative=bound, of_all=0)


@pytest.mark.parametrize("name", ["M", "m", "G"])
def test_tokens_that_forget_everything(name: str) -> None:
    kernel, recurrence = KERNELS[name]
    t = inputs(name, 44)
    if name == "G":
        t["decay"][[5, 11, 32]] = -torch.inf
    else:
        t["dt"][[5, 11, 32]] = 1e10
    assert_equal(outcome(kernel, t, chunk=4, passing=Here(4)), outcome(recurrence, t), of_all=0)


@pytest.mark.parametrize("name", KERNELS)
def test_no_grad_and_recomputation(name: str) -> None:
    kernel, _ = KERNELS[name]
    t, ids = inputs(name, 44), rows(11, 4, 2)
    options = {"chunk": 4, "documents": ids, "passing": Here(4, ids)}
    expected = outcome(kernel, t, **options)
    with torch.no_grad():
        assert torch.equal(call(kernel, t, **options)[0], expected["y"])

    def recomputed(**args: Any) -> tuple[Tensor, Tensor]:
        return checkpoint(kernel, use_reentrant=False, **args)

    assert_equal(outcome(recomputed, t, **options), expected, relative=0, of_all=0)


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_over_segments_equals_autograd(n: int, packed: bool, matrix: bool) -> None:
    g = torch.Generator().manual_seed(0)
    shape = (n, 2, 3, 4, 5)  # [n, B, H, P, V]
    states, weights = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    last = (4, 4) if matrix else (1, 5)
    transitions = torch.randn(*shape[:3], *last, generator=g, dtype=torch.float64)
    same = torch.rand(n - 1, 2, generator=g) < 0.6 if packed else None
    states.requires_grad_()
    before = [states[0] * 0]
    for j in range(1, n):
        t = transitions[j - 1]
        after = (t @ before[-1] if matrix else t * before[-1]) + states[j - 1]
        before.append(after if same is None else after * same[j - 1, :, None, None, None])
    loss = (torch.stack(before) * weights).sum()
    expected = {"before": torch.stack(before), "after": torch.autograd.grad(loss, states)[0]}
    got = {
        "before": states_before(states.detach(), transitions, same, matrix),
        "after": grads_after(weights, transitions, same, matrix),
    }
    assert_equal(got, {key: v.detach() for key, v in expected.items()}, of_all=0)


@pytest.mark.parametrize("name", KERNELS)
def test_bad_calls(name: str) -> None:
    kernel, t = KERNELS[name][0], inputs(name, 10)
    with pytest.raises(ValueError, match="10 tokens in 4 equal segments"):
        call(kernel, t, chunk=2, passing=Here(4))
    _, state = call(kernel, t, chunk=2)
    with pytest.raises(ValueError, match="initial_state beside passing"):
        call(kernel, t, chunk=2, passing=Here(2), initial_state=state)
