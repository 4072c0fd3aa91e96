"""Segments of a sequence that run at once, against the token recurrence over the full sequence."""

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
from colonnade.kernels.segments import LocalStatePassing, Wait, grads_after, states_before
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


def rows(length: int, segments: int, B: int) -> Tensor:
    """Documents `[S, B]` that start within segments and between them; one spans over three."""
    S = length * segments
    bounds = [(3, length, 4 * length + 2), (length - 1, 2 * length, 2 * length + 1, S - 1)]
    position = torch.arange(S)
    return torch.stack([sum((position >= b).int() for b in bounds[row]) for row in range(B)], 1)


def numbered_locally(documents: Tensor, segments: int) -> Tensor:
    """The same, numbered from 0 in every segment: no number relates to those of other segments."""
    by_segment = documents.unflatten(0, (segments, -1))
    return (by_segment - by_segment[:, :1]).flatten(0, 1)


def results(scan: Scan, t: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Outputs, and gradients of a random function of them, the same in every dtype."""
    t = {key: v.detach().requires_grad_() for key, v in t.items()}
    y, _ = call(scan, t, **options)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g).bfloat16().to(y.dtype)
    gradients = torch.autograd.grad(y, list(t.values()), dy)
    return {"y": y.detach()} | {f"d{k}": v for k, v in zip(t, gradients, strict=True)}


@pytest.mark.parametrize(("length", "chunk", "B"), [(11, 4, 2), (12, 5, 1), (10, 5, 2), (4, 64, 2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("segments", [1, 2, 4, 8])
@pytest.mark.parametrize("name", KERNELS)
def test_equals_recurrence(
    name: str, segments: int, packed: bool, length: int, chunk: int, B: int
) -> None:
    kernel, recurrence = KERNELS[name]
    t = inputs(name, segments * length, B)
    ids = rows(length, segments, B) if packed else None
    local = None if ids is None else numbered_locally(ids, segments)
    got = results(
        kernel, t, chunk=chunk, documents=local, state_passing=LocalStatePassing(segments, ids)
    )
    assert_equal(got, results(recurrence, t, documents=ids), of_all=0)


@pytest.mark.parametrize("name", KERNELS)
def test_states_after_each_segment(name: str) -> None:
    kernel, recurrence = KERNELS[name]
    t, ids = inputs(name, 44), rows(11, 4, 2)
    t = {key: v.requires_grad_() for key, v in t.items()}
    _, states = call(kernel, t, chunk=4, documents=ids, state_passing=LocalStatePassing(4, ids))
    assert not states.requires_grad
    for j, state in enumerate(states):
        end = 11 * (j + 1)
        until = {key: v[:end] if len(v) == 44 else v for key, v in t.items()}
        _, expected = call(recurrence, until, documents=ids[:end])
        assert_equal({"state": state}, {"state": expected.detach()}, of_all=0)


class Recorded(LocalStatePassing):
    """Records calls and arguments; checks that the kernel does not change these until it waits."""

    def __init__(self, segments: int, documents: Tensor | None = None) -> None:
        super().__init__(segments, documents)
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

    def launch_backward(self, grad: Tensor, transition: Tensor, matrix: bool) -> Wait:
        wait = super().launch_backward(grad, transition, matrix)
        return self.record("launch_backward", wait, grad, transition)


class Products(TorchDispatchMode):
    """Records matrix products among the events."""

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
    state_passing = Recorded(2)
    with Products(state_passing.events):
        results(KERNELS[name][0], inputs(name, 24), chunk=4, state_passing=state_passing)
    exchanges = [e for e in state_passing.events if e != "product"]
    assert exchanges == ["launch", "launch waited", "launch_backward", "launch_backward waited"]
    for direction in ("launch", "launch_backward"):
        start, stop = (state_passing.events.index(e) for e in (direction, f"{direction} waited"))
        assert name in "mS" or "product" in state_passing.events[start:stop]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", KERNELS)
def test_segments_that_are_not_adjacent(name: str, rank: int) -> None:
    """A rank of a zigzag over two sends the states of its two segments, and gets those before."""
    kernel, _ = KERNELS[name]
    t, ids, held = inputs(name, 44), rows(11, 4, 2), [rank, 3 - rank]

    def local(v: Tensor) -> Tensor:
        return v.unflatten(0, (4, 11))[held].flatten(0, 1) if len(v) == 44 else v

    def with_gradients(
        state_passing: LocalStatePassing, t: dict[str, Tensor], ids: Tensor, dy: Tensor
    ) -> dict[str, Tensor]:
        t = {key: v.requires_grad_() for key, v in t.items()}
        y, states = call(kernel, t, chunk=4, documents=ids, state_passing=state_passing)
        gradients = torch.autograd.grad(y, list(t.values()), dy)
        return {"y": y, "states": states} | dict(zip(t, gradients, strict=True))

    class Rank(Recorded):
        """Returns the local segments' share of what a device with all segments was returned."""

        def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Wait:
            before = every.returned["launch"]
            return self.record("launch", lambda: before[held], state, transition)

        def launch_backward(self, grad: Tensor, transition: Tensor, matrix: bool) -> Wait:
            after = every.returned["launch_backward"]
            return self.record("launch_backward", lambda: after[held], grad, transition)

    every, one_rank = Recorded(4, ids), Rank(2)
    dy = torch.randn(call(kernel, t, chunk=4)[0].shape, dtype=torch.float64)
    full = with_gradients(every, t, ids, dy)
    local_t = {key: local(v.detach()) for key, v in t.items()}
    got = with_gradients(one_rank, local_t, local(ids), local(dy))
    for key, v in full.items():
        if key == "states" or len(v) == 44:  # other gradients are sums over the ranks
            expected = v[held] if key == "states" else local(v)
            assert_equal({key: got[key]}, {key: expected}, of_all=0)
    for direction, sent in one_rank.given.items():
        for a, b in zip(sent, every.given[direction], strict=True):
            assert_equal({direction: a}, {direction: b[held]}, of_all=0)


@pytest.mark.parametrize("name", KERNELS)
def test_bf16(name: str) -> None:
    """Against fp64 of the same rounded inputs: the errors are those of the kernel only."""
    kernel, recurrence = KERNELS[name]
    t, ids = inputs(name, 88), rows(22, 4, 2)
    if "k" in t:
        t["k"] *= 1 - 2**-7  # so that rounding leaves no norm above 1
    narrow = {k: v.to(torch.float32 if k in WIDE else torch.bfloat16) for k, v in t.items()}
    state_passing = Recorded(4, ids)
    got = results(kernel, narrow, chunk=8, documents=ids, state_passing=state_passing)
    assert got["y"].dtype == torch.bfloat16
    assert all(got[f"d{k}"].dtype == v.dtype for k, v in narrow.items())
    assert all(v.dtype == torch.float32 for sent in state_passing.given.values() for v in sent)
    expected = results(recurrence, {k: v.double() for k, v in narrow.items()}, documents=ids)
    for key, v in got.items():
        bound = 1e-2 if v.dtype == torch.bfloat16 else 1e-4
        assert_equal({key: v}, {key: expected[key]}, relative=bound, of_all=0)


@pytest.mark.parametrize("name", ["M", "m", "G"])
def test_tokens_that_decay_the_state_to_zero(name: str) -> None:
    kernel, recurrence = KERNELS[name]
    t = inputs(name, 44)
    if name == "G":
        t["decay"][[5, 11, 32]] = -torch.inf
    else:
        t["dt"][[5, 11, 32]] = 1e10
    assert_equal(
        results(kernel, t, chunk=4, state_passing=LocalStatePassing(4)),
        results(recurrence, t),
        of_all=0,
    )


@pytest.mark.parametrize("name", KERNELS)
def test_no_grad_and_recomputation(name: str) -> None:
    kernel, _ = KERNELS[name]
    t, ids = inputs(name, 44), rows(11, 4, 2)
    options = {"chunk": 4, "documents": ids, "state_passing": LocalStatePassing(4, ids)}
    expected = results(kernel, t, **options)
    with torch.no_grad():
        assert torch.equal(call(kernel, t, **options)[0], expected["y"])

    def recomputed(**args: Any) -> tuple[Tensor, Tensor]:
        return checkpoint(kernel, use_reentrant=False, **args)

    assert_equal(results(recomputed, t, **options), expected, relative=0, of_all=0)


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
        call(kernel, t, chunk=2, state_passing=LocalStatePassing(4))
    _, state = call(kernel, t, chunk=2)
    with pytest.raises(ValueError, match="initial_state together with state_passing"):
        call(kernel, t, chunk=2, state_passing=LocalStatePassing(2), initial_state=state)
