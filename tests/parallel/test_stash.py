"""The stash: the order of its copies, what it frees and when; no bit of a gradient changes."""

import itertools
import random
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from delayed import DelayedLanes
from machine import PASSES, MachineLanes
from oracle import gradients
from small import B, S, config_of, context, data, model_of
from torch import Tensor

from colonnade.models.decoder import Decoder
from colonnade.models.wiring import State
from colonnade.parallel import stash as stash_module
from colonnade.parallel.lanes.clock import ClockLanes, Operation
from colonnade.parallel.lanes.pinned import PinnedMemoryError, pinned_bytes
from colonnade.parallel.lanes.tasks import FETCH, STASH, Event, ImmediateLanes, Run, Task
from colonnade.parallel.recompute import recompute, stash_of
from colonnade.parallel.stash import IN_FLIGHT, Pool, Stash, Stashed, host_bytes
from colonnade.parallel.storages import ACTIVATIONS, STASHED, StorageLedger

CPU = torch.device("cpu")
EVERY = "*-EMmDGT"


def built(name: str, pattern: str, stash: Stash | None, **fields: Any) -> Decoder:
    """A model with this recomputation, whose inputs a stash takes."""
    model = model_of(config_of(pattern, balance=0.1, **fields), 1)
    recompute(model, name, stash=stash)
    return model


def objective(model: Decoder, seed: int) -> Tensor:
    tokens, labels = data(seed)
    return model(tokens, context(), labels)[0]


def step(model: Decoder, seed: int) -> dict[str, Tensor]:
    """The gradients of one micro-batch."""
    model.zero_grad()
    objective(model, seed).backward()
    return gradients(model)


def assert_same_bits(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name, t in expected.items() if not torch.equal(ours[name], t)] == []


def delayed(seed: int, dropped: str | None = None) -> Stash:
    """A stash whose copies are late."""
    return Stash(lambda device: DelayedLanes(random.Random(seed), dropped))


# Gradients


@pytest.mark.parametrize(
    ("name", "residual", "position"),
    [("block", "standard", "before"), ("selective", "ladder", "before"),
     ("block", "ladder", "both"), ("selective", "standard", "after"),
     ("block", "parallel", "before")],
)  # fmt: skip
def test_no_bit_of_a_gradient_changes(name: str, residual: str, position: str) -> None:
    """Nor does the pool grow after the first step."""
    fields = {"residual": residual, "norm_position": position, "sigma_reparam": True}
    plain = built(name, EVERY, None, **fields)
    expected = [step(plain, seed) for seed in range(2)]
    for stash in (Stash(), delayed(1)):
        model, buffers = built(name, EVERY, stash, **fields), []
        for seed in range(2):
            assert_same_bits(step(model, seed), expected[seed])
            buffers.append(len(stash.pool.buffers))
        norms = 2 if position == "both" else 1
        assert buffers == [(1 + norms) * len(EVERY)] * 2
        assert sum(map(len, stash.pool.unused.values())) == buffers[0]
        assert not stash.on_device()


@pytest.mark.parametrize("fields", [{"norm": "layer"}, {"norm": "crms"}, {"mtp": 2}], ids=str)
def test_other_models(fields: dict[str, Any]) -> None:
    fields = {"mtp_pattern": "*E", "norm_weight": True, **fields} if "mtp" in fields else fields
    model, plain = (
        built("block", "*-M", delayed(3), **fields),
        built("block", "*-M", None, **fields),
    )
    assert_same_bits(step(model, 1), step(plain, 1))


@pytest.mark.parametrize("dropped", [STASH, FETCH])
def test_a_wait_that_is_left_out_is_noticed(dropped: str) -> None:
    expected = step(built("block", "*-M-", None), 1)
    failures = 0
    for seed in range(5):
        try:
            assert_same_bits(step(built("block", "*-M-", delayed(seed, dropped)), 1), expected)
        except AssertionError:
            failures += 1
    assert failures


def test_backward_passes_in_any_order() -> None:
    """Three micro-batches are in flight; the pool grows to what all of them need, once."""
    model, plain = built("block", "*-M-", stash := delayed(4)), built("block", "*-M-", None)
    weights, plain_weights = list(model.parameters()), list(plain.parameters())
    expected = [torch.autograd.grad(objective(plain, seed), plain_weights) for seed in range(3)]
    for order in itertools.permutations(range(3)):
        objectives = [objective(model, seed) for seed in range(3)]
        for seed in order:
            found = torch.autograd.grad(objectives[seed], weights)
            assert all(map(torch.equal, found, expected[seed]))
        assert len(stash.pool.buffers) == 3 * 2 * 4


def test_a_retained_graph_is_differentiated_again() -> None:
    model = built("block", "*-M-", stash := delayed(5))
    weights = list(model.wiring.parameters())[:-1]  # but for that of the final norm
    total = model.wiring.run(State(torch.randn(S, B, 12).double()), context())[0].stream.sum()
    one, two = (torch.autograd.grad(total, weights, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, one, two))
    assert not stash.pool.unused[S * B * 12 * 8]
    del total
    assert len(stash.pool.unused[S * B * 12 * 8]) == 8


def test_passes_without_backward() -> None:
    """Their buffers are used again, but for those of the tensors that are still on the device."""
    stash = Stash()
    model = built("block", "*-M-", stash)
    for _ in range(4):
        objective(model, 1)
    assert len(stash.pool.buffers) == 8
    assert len(stash.on_device()) == IN_FLIGHT
    assert_same_bits(step(model, 1), step(built("block", "*-M-", None), 1))
    assert not stash.on_device()
    assert len(stash.pool.buffers) == 8


def test_part_of_a_backward_pass() -> None:
    """What came back and was not used is freed, with its buffer."""
    stash = delayed(6)
    model = built("block", "*-M-", stash)
    total = objective(model, 1)
    (grad,) = torch.autograd.grad(total, next(model.wiring.block(2).parameters()))
    plain = built("block", "*-M-", None)
    (expected,) = torch.autograd.grad(objective(plain, 1), next(plain.wiring.block(2).parameters()))
    assert torch.equal(grad, expected)
    assert len(stash.on_device()) == IN_FLIGHT - 3
    del total
    assert_same_bits(step(model, 2), step(plain, 2))
    assert len(stash.pool.buffers) <= 8 + IN_FLIGHT


def test_frozen_sub_blocks_stash_nothing() -> None:
    stash = Stash()
    model = built("block", "*-M-", stash, tied=False)
    frozen = [model.embedding, *model.wiring.norms.values(), model.wiring.blocks["0"]]
    for module in frozen:
        module.requires_grad_(False)
    objective(model, 1).backward()
    assert stash.count == 5  # sub-blocks 1, 2 and 3, and the norms before 2 and 3


def test_without_gradients_nothing_is_stashed() -> None:
    model = built("block", "*-", stash := Stash())
    with torch.no_grad():
        objective(model, 1)
    assert stash.count == 0


def test_models_without_a_stash() -> None:
    assert stash_of(built("block", "*-", None)) is None
    assert stash_of(built("none", "*-", Stash())) is None


# Memory


def bytes_held(name: str, stash: Stash | None, **fields: Any) -> tuple[int, int, int]:
    """Bytes of the device at the end of a forward pass and at the peak of the following backward
    pass, and those of the host."""
    model = built(name, "*-M-", stash, repeat=3, **fields)
    step(model, 1)
    step(model, 1)  # whose gradients exist already, as do the buffers of the host
    ledger = StorageLedger()
    ledger.hold("parameters", model.parameters())
    ledger.hold("gradients", [p.grad for p in model.parameters() if p.grad is not None])
    host = [] if stash is None else list(stash.on_host())
    ledger.hold(STASHED, host)
    with ledger:
        total = objective(model, 1)
        middle = ledger.mark()
        total.backward()
        stop = ledger.mark()
    held = ledger.held(middle)
    return held[ACTIVATIONS], ledger.peak(middle, stop, (ACTIVATIONS,)).total, held.get(STASHED, 0)


@pytest.mark.parametrize("residual", ["standard", "ladder"])
@pytest.mark.parametrize("name", ["block", "selective"])
def test_bytes_of_the_device_and_of_the_host(name: str, residual: str) -> None:
    """Of twelve sub-blocks the inputs, and those of their norms with the scale of each row, are on
    the host, but for the last few."""
    one, scale = S * B * 12 * 8, S * B * 8
    plain_held, plain_peak, nothing = bytes_held(name, None, residual=residual)
    held, peak, host = bytes_held(name, Stash(), residual=residual)
    assert nothing == 0
    assert host == 24 * one
    # The first two norms of a ladder have the same input.
    assert held == plain_held - (24 - IN_FLIGHT - (residual == "ladder")) * one - 12 * scale
    assert peak <= plain_peak - 18 * one


class Watching(ImmediateLanes):
    """Lanes that note what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def launch(self, task: Task, run: Run, after: Any = ()) -> Event:
        self.kinds.append(task.kind)
        return super().launch(task, run, after)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_every_tensor_comes_back_once(residual: str, gathers: bool) -> None:
    """Also where, to overlap with an all-gather, a norm runs between the halves of the sub-block
    before it, and in backward too."""
    lanes = Watching()
    model = built("block", "*-M-", Stash(lambda device: lanes), residual=residual)
    model.wiring.gathers = gathers
    step(model, 1)
    assert lanes.kinds.count(STASH) == 8
    assert lanes.kinds.count(FETCH) == 8 - IN_FLIGHT


def test_copies_back_are_launched_one_sub_block_ahead() -> None:
    lanes = Watching()
    stash = Stash(lambda device: lanes)
    values = torch.arange(8.0)
    stashed = [stash.put(v.clone(), ends=bool(n % 2)) for n, v in enumerate(values)]
    launched = []
    while stashed:
        lanes.kinds.clear()
        assert stashed.pop().take() == values[len(stashed)]
        launched.append(len(lanes.kinds))
    # when x3 n3, x2 n2, x1 n1 and x0 n0 are taken; n2 is still on the device
    assert launched == [0, 0, 1, 0, 2, 0, 1, 0]


# Order: a device whose passes run on a stream, behind the thread that queues them


class Memory:
    """Memory of a device: it is used again when nobody has a tensor any more, by what the passes
    queue from then on, which spoils it."""

    def __init__(self, lanes: "StreamLanes") -> None:
        self.lanes = lanes
        self.free: list[np.ndarray] = []
        self.of_tensor: dict[int, np.ndarray] = {}  # by address

    def allocate(self, *_: Any, **like: Any) -> Tensor:
        memory = self.free.pop() if self.free else np.zeros(2)
        view = memory[:]
        weakref.finalize(view, self.give_back, memory)
        tensor = torch.from_numpy(view)
        self.of_tensor[tensor.data_ptr()] = memory
        return tensor

    def give_back(self, memory: np.ndarray) -> None:
        self.lanes.pass_through(partial(memory.fill, np.nan))
        self.free.append(memory)


class StreamLanes(MachineLanes):
    """Lanes beside the stream of the passes, which copy between addresses, as a GPU does: an
    operation that is queued keeps nothing in memory. The order `dropped` is not kept."""

    def __init__(self, rng: random.Random, dropped: str | None) -> None:
        super().__init__(rng, dropped)
        self.memory = Memory(self)

    def launch(self, task: Task, run: Run, after: Any = ()) -> Operation:
        stashed = run.__self__  # type: ignore[attr-defined]  # a bound method
        device = self.memory.of_tensor[stashed.tensor.data_ptr()]
        host = stashed.buffer.numpy().view(np.float64)
        ends = (host, device) if task.kind == STASH else (device, host)
        return super().launch(task, partial(np.copyto, *ends), after)

    def passes_wait(self, event: Operation) -> None:
        assert event.task is not None
        if self.dropped != f"passes {event.task.kind}":
            task = Task(PASSES, 0, 1)
            self.last_pass = ClockLanes.launch(self, task, lambda: None, [event])


class Passes:
    """Forward and backward passes that write and read numbers through a stash."""

    def __init__(self, seed: int, dropped: str | None) -> None:
        self.rng = random.Random(seed)
        self.lanes = StreamLanes(self.rng, dropped)
        self.memory = self.lanes.memory
        self.stash = Stash(lambda device: self.lanes, self.memory.allocate)
        self.wrong: list[tuple[float, float]] = []
        self.values = 0

    def check(self, memory: np.ndarray, value: int) -> None:
        if not (memory == value).all():
            self.wrong.append((memory[0], value))

    def use(self, tensor: Tensor, value: int) -> None:
        """The passes read a tensor."""
        memory = self.memory.of_tensor[tensor.data_ptr()]
        self.lanes.pass_through(partial(self.check, memory, value))
        self.lanes.pass_time(self.rng.choice([0.0, 0.0, 1.0]) * self.rng.random())

    def forward(self) -> list[tuple[int, Stashed]]:
        kept = []
        for number in range(self.rng.randint(1, 9)):
            self.values += 1
            tensor, value = self.memory.allocate(), self.values
            memory = self.memory.of_tensor[tensor.data_ptr()]
            self.lanes.pass_through(partial(memory.fill, value))
            kept.append((value, self.stash.put(tensor, ends=bool(number % 2))))
            self.use(tensor, value)
        return kept

    def backward(self, kept: list[tuple[int, Stashed]]) -> None:
        while kept and self.rng.random() < 0.9:  # else backward ends early, and drops its graph
            value, stashed = kept.pop()
            if self.rng.random() < 0.9:  # else backward does not need it
                self.use(stashed.take(), value)

    def run(self) -> list[tuple[float, float]]:
        """Runs passes in a random order; returns what was read wrongly."""
        waiting: list[list[tuple[int, Stashed]]] = []
        for _ in range(12):
            waiting.append(self.forward())
            while waiting and self.rng.random() < 0.6:
                self.backward(waiting.pop(self.rng.randrange(len(waiting))))
        while waiting:
            self.backward(waiting.pop())
        while self.lanes.run_next():
            pass
        return self.wrong


def test_every_order_of_copies_and_passes() -> None:
    assert [seed for seed in range(150) if Passes(seed, None).run()] == []


@pytest.mark.parametrize(
    "dropped", [f"{STASH} 0", f"{FETCH} 0", f"passes {STASH}", f"passes {FETCH}"]
)
def test_every_wait_is_needed_in_some_order(dropped: str) -> None:
    assert any(Passes(seed, dropped).run() for seed in range(60))


# Time


def seconds_of_passes(copies: float) -> tuple[float, int]:
    """The time of ten sub-blocks, of 1 second forward and 2 backward, where copies of their inputs
    and of those of their norms take so long each; and the number of copies."""
    lanes = ClockLanes(lambda task: copies)
    stash = Stash(lambda device: lanes)
    kept: list[Stashed] = []
    for _ in range(10):
        kept.append(stash.put(torch.zeros(1), ends=False))
        kept.append(stash.put(torch.zeros(1), ends=True))
        lanes.pass_time(1.0)
    while kept:
        kept.pop().take()  # the input: the sub-block is recomputed
        lanes.pass_time(2.0)
        kept.pop().take()
    return lanes.now, len(lanes.log)


def test_copies_hide_behind_passes() -> None:
    """Two copies take no longer than a sub-block: nothing waits. All but the last four tensors come
    back. Copies that take twice as long determine the time."""
    assert seconds_of_passes(0.5) == (30.0, 20 + 16)
    slow, _ = seconds_of_passes(2.0)
    assert 16 * 2.0 + 16 * 2.0 <= slow <= 30.0 + 16 * 2.0 + 16 * 2.0


# Memory of the host


class Driver:
    """A driver that registers memory, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if sum(self.registered.values()) + size > self.limit:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_pinned_memory_is_registered_as_long_as_it_lives() -> None:
    driver = Driver(5000)
    memory, status = pinned_bytes(4000, driver)
    assert (memory.shape, memory.dtype, status) == ((4000,), torch.uint8, 0)
    assert driver.registered == {memory.data_ptr(): 4000}
    assert memory.data_ptr() % 4096 == 0
    view = memory[8:16].view(torch.float64).fill_(3.0)
    refused, status = pinned_bytes(2000, driver)
    assert (len(refused), status) == (2000, 2)
    del memory, refused
    assert len(driver.registered) == 1
    assert view.item() == 3.0
    del view
    assert not driver.registered


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash_module, "pinned_bytes", lambda size: (torch.empty(size), 2))
    with pytest.raises(PinnedMemoryError, match=r"train.offload_inputs: .* 2\.0 MiB .* error 2"):
        Pool().take(2 << 20, torch.device("cuda"))
    assert host_bytes(7, CPU).numel() == 7
