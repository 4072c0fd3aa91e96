"""The schedule of offloaded state on simulated machines: every order, and every wait that it needs.

A model of the work stands for tensors: it keeps the number of the step that each copy of a group's
state is at, and raises where an operation finds another one than a correct order would.
"""

import random
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import MachineLanes, OrderError, require

from colonnade.bench.offload_clock import MACHINES, figures
from colonnade.parallel.lanes.tasks import HOST, LANES, STORE, Run
from colonnade.parallel.optimizer.offload.placement import (
    bound,
    diffuse,
    place,
    share_on_device,
    simulate,
)
from colonnade.parallel.optimizer.offload.placer import Placer
from colonnade.parallel.optimizer.offload.rates import Rates
from colonnade.parallel.optimizer.offload.scheduler import GroupSize, Scheduler

WAITS = (
    "gradient 0",  # for backward to have made it
    "load 0",  # for the slot
    "update 0",  # for the load
    "update 1",  # for the sums that complete gradients after the passes
    "store 0",  # for the update
    "weights 0",  # for the passes
    "wait gradient",  # before the update on the host
    "wait weights",  # before the step is done
    "wait store",
)


@dataclass(eq=False)
class Memory:
    """A slot: the group that it holds, at which step; whether passes may still use it, and whether
    the device may have given it to others."""

    busy: bool
    content: tuple[int, int] | None = None
    released: bool = False


@dataclass
class ModelOfWork:
    """Numbers of steps instead of tensors."""

    lanes: MachineLanes
    parts: list[int]
    scratch: int = 0  # bytes of temporary tensors of an update
    room: int = 1 << 60  # bytes that the device had free when it was asked last
    step: int = 0
    passed: bool = False
    completed: bool = False
    gradients: dict[tuple[int, int], int] = field(default_factory=dict)
    arrived: dict[tuple[int, int], int] = field(default_factory=dict)
    masters: dict[int, int] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)
    allocated: list[Memory] = field(default_factory=list)

    def has_gradient(self, group: int, index: int) -> bool:
        return True

    def make_gradient(self, group: int, index: int) -> None:
        self.gradients[group, index] = self.step

    def end_passes(self) -> None:
        self.passed = True

    def complete_gradients(self) -> None:
        self.completed = True

    def copy_gradient(self, group: int, index: int) -> None:
        require(self.gradients.get((group, index)) == self.step, "a gradient that is not made")
        self.arrived[group, index] = self.step

    def drop_gradient(self, group: int, index: int) -> None:
        require(self.arrived.get((group, index)) == self.step, "dropped before it was copied")
        del self.gradients[group, index]

    def allocate(self, size: int) -> Memory:
        fits = size + self.scratch <= self.room
        require(not self.allocated or fits, "a slot that the budget does not allow")
        memory = Memory(busy=self.lanes.last_pass.end is None)

        def freed() -> None:
            memory.busy = False

        if memory.busy:
            self.lanes.last_pass.run = chained(self.lanes.last_pass.run, freed)
        self.allocated.append(memory)
        return memory

    def release(self) -> None:
        """The slots of a step are freed at its end."""
        for memory in self.allocated:
            memory.released = True

    def load(self, group: int, memory: Memory) -> None:
        require(not memory.released, "a load into memory that was freed")
        require(not memory.busy, "passes still use the memory of the slot")
        require(memory.content is None, "a slot was loaded before its state was stored")
        memory.content = group, self.masters[group]

    def update(self, group: int, memory: Memory) -> None:
        require(memory.content == (group, self.step - 1), "an update of what is not loaded")
        for index in range(self.parts[group]):
            require(self.gradients.get((group, index)) == self.step, "an update without gradient")
        require(self.completed, "an update from partial gradients")
        memory.content, self.weights[group] = (group, self.step), self.step

    def store(self, group: int, memory: Memory) -> None:
        require(memory.content == (group, self.step), "a store of what is not updated")
        require(self.masters[group] == self.step - 1, "an update that was made twice")
        self.masters[group], memory.content = self.step, None

    def update_on_host(self, group: int, indices: list[int]) -> None:
        require(indices == list(range(self.parts[group])), "an update without a gradient")
        for index in range(self.parts[group]):
            require(self.arrived.get((group, index)) == self.step, "a gradient is not on the host")
        require(self.masters[group] == self.step - 1, "an update that was made twice")
        self.masters[group] = self.step

    def copy_weights(self, group: int, indices: list[int]) -> None:
        require(self.masters[group] == self.step, "weights of another step")
        require(self.passed, "weights were written while passes used them")
        self.weights[group] = self.step


def chained(first: Run, second: Run) -> Run:
    """Returns what runs both."""

    def run() -> None:
        first()
        second()

    return run


def run_steps(seed: int, groups: int, steps: int, dropped: str | None = None) -> None:
    """Runs steps on a random machine, and checks after each that every group was updated once."""
    rng = random.Random(seed)
    lanes = MachineLanes(rng, dropped)
    scratch = rng.choice([0, 500])
    sizes = [
        GroupSize(n, 12 * n, tuple(4 for _ in range(rng.randint(1, 3))), 2 * n, scratch)
        for n in (rng.randint(1, 100) for _ in range(groups))
    ]
    work = ModelOfWork(lanes, [len(size.gradients) for size in sizes], scratch)
    work.masters = dict.fromkeys(range(groups), 0)

    def allows(size: int) -> bool:
        work.room = rng.randint(0, 2 * size)
        return size <= work.room

    scheduler = Scheduler(lanes, work, sizes, allows, most_slots=rng.randint(1, 4))
    for _ in range(steps):
        on_device = [rng.random() < 0.5 for _ in sizes]
        run_step(scheduler, work, rng, on_device)
        work.weights = {group: work.weights.get(group, 0) for group in range(groups)}
        state = {**{f"m{g}": s for g, s in work.masters.items()},
                 **{f"w{g}": s for g, s in work.weights.items()}}  # fmt: skip
        require(set(state.values()) <= {work.step}, f"not at step {work.step}: {state}")
        for kind in LANES:
            require(not lanes.queues[kind], f"{kind} is still queued after the step")
        require(len(work.allocated) <= scheduler.most_slots, "more slots than allowed")


def run_step(
    scheduler: Scheduler, work: ModelOfWork, rng: random.Random, on_device: list[bool]
) -> None:
    """Runs one step: gradients become complete in order, but for late ones, and are updated."""
    work.step += 1
    work.passed, work.completed, work.allocated = False, False, []
    lanes = work.lanes
    late = {
        (g, p) for g, count in enumerate(work.parts) for p in range(count) if rng.random() < 0.2
    }
    scheduler.begin(on_device)
    for group, count in enumerate(work.parts):
        for index in range(count):
            lanes.pass_through(partial(work.make_gradient, group, index))
            if (group, index) not in late and not on_device[group]:
                scheduler.send_gradient(group, index)
            lanes.pass_time(rng.random())
    lanes.pass_through(work.end_passes)
    if rng.random() < 0.5:
        scheduler.prefetch()
        lanes.pass_time(rng.random())
    lanes.pass_through(work.complete_gradients)
    scheduler.step(on_device)
    work.release()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), groups=st.integers(1, 8))
def test_every_group_is_updated_once_in_any_order_of_the_lanes(seed: int, groups: int) -> None:
    run_steps(seed, groups, steps=3)


@pytest.mark.parametrize("dropped", WAITS)
def test_without_any_one_wait_some_order_fails(dropped: str) -> None:
    failures = 0
    for seed in range(60):
        try:
            run_steps(seed, 5, steps=2, dropped=dropped)
        except (OrderError, AssertionError, KeyError):
            failures += 1
    assert failures, f"{dropped} is never needed"


def discard_and_go_on(seed: int, dropped: str | None = None) -> None:
    """Discards a step, and runs the next; raises where copies of the first are still in flight."""
    rng = random.Random(seed)
    lanes = MachineLanes(rng, dropped)
    sizes = [GroupSize(10, 120, (40,), 20) for _ in range(4)]
    work = ModelOfWork(lanes, [1] * 4, masters=dict.fromkeys(range(4), 0))
    scheduler = Scheduler(lanes, work, sizes, lambda size: True)
    work.step = 1
    scheduler.begin([True, False, True, False])
    for group in range(4):
        lanes.pass_through(partial(work.make_gradient, group, 0))
        if group % 2:
            scheduler.send_gradient(group, 0)
    scheduler.prefetch()
    scheduler.discard()
    work.release()
    require(set(work.masters.values()) == {0} and not work.weights, "an update of a skipped step")
    work.step, work.allocated, work.gradients = 0, [], {}  # the skipped step counts as none
    run_step(scheduler, work, rng, [False, True, True, False])
    state = {*work.masters.values(), *work.weights.values()}
    require(state == {1}, f"after the next step groups are at {state}")


def test_a_discarded_step_changes_nothing() -> None:
    """Its copies are waited for, and the next step works as ever."""
    for seed in range(40):
        discard_and_go_on(seed)


@pytest.mark.parametrize("dropped", ["wait gradient", "wait load"])
def test_a_discarded_step_waits_for_its_copies(dropped: str) -> None:
    failures = 0
    for seed in range(40):
        try:
            discard_and_go_on(seed, dropped)
        except (OrderError, AssertionError, KeyError):
            failures += 1
    assert failures, f"{dropped} is never needed"


RATES = st.builds(
    Rates,
    host=st.floats(1e8, 1e10),
    device=st.floats(1e9, 1e11),
    to_device=st.floats(1e9, 1e12),
    to_host=st.floats(1e9, 1e12),
    duplex=st.booleans(),
)
SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=12)


def group_sizes(counts: list[int]) -> list[GroupSize]:
    """Groups of fp32 state and bf16 weights."""
    return [GroupSize(n, 12 * n, (4 * n,), 2 * n) for n in counts]


@settings(max_examples=100, deadline=None)
@given(counts=SIZES, rates=RATES, slots=st.integers(0, 3))
def test_predictions_are_between_the_bound_and_the_host_alone(
    counts: list[int], rates: Rates, slots: int
) -> None:
    sizes = group_sizes(counts)
    marks, seconds = place(sizes, rates, slots)
    assert slots or not any(marks)
    alone, _ = simulate(sizes, [False] * len(sizes), rates, slots)
    assert bound(sizes, marks, rates) <= seconds * (1 + 1e-9) <= alone * (1 + 2e-9)
    again, log = simulate(sizes, marks, rates, max(slots, 1))
    assert again == seconds
    kinds = [operation.task.kind for operation in log if operation.task]
    assert kinds.count(STORE) == sum(marks)
    assert kinds.count(HOST) == len(marks) - sum(marks)


@given(counts=SIZES, share=st.floats(0, 1))
def test_error_diffusion_keeps_the_share_up_to_every_group(counts: list[int], share: float) -> None:
    marked = owed = 0.0
    for count, there in zip(counts, diffuse(counts, share), strict=True):
        owed += share * count
        marked += count * there
        assert abs(owed - marked) <= max(counts) * (1 + 1e-9)
    assert sum(diffuse(counts, 0.0)) == 0
    assert all(diffuse(counts, 1.0))


def test_the_share_is_that_of_the_published_model() -> None:
    """Duplex links of 50 GB/s and 2.2e9 updates a second on the host want 65% on the device."""
    sizes = group_sizes([10**8] * 10)
    h100 = Rates(host=2.2e9, device=1e12, to_device=5e10, to_host=5e10)
    assert share_on_device(sizes, h100) == pytest.approx(1 / (1 + 2.2 * 12 / 50))
    marks, seconds = place(group_sizes([10**7] * 200), h100)
    assert 0.55 < sum(marks) / 200 < 0.7
    assert seconds < 0.45 * 2e9 / h100.host


@pytest.mark.parametrize("name", MACHINES)
def test_published_machines_on_the_clock(name: str) -> None:
    """Faster than serial offload and than asynchronous gradients alone, and near the bound."""
    found, log = figures(MACHINES[name])
    assert found["serial / interleaved"] > 2.5
    assert found["flush / interleaved"] > 1.17
    assert 0.85 < found["bound / interleaved, updates"] <= 1
    assert found["update_seconds"]["predicted"] == pytest.approx(
        found["update_seconds"]["interleaved"], rel=0.02
    )
    published = {"H100, PCIe 5": (7.288, 3.811), "A100, PCIe 4": (7.570, 6.094)}
    for measured, kind in zip(published.get(name, ()), ("serial", "flush"), strict=False):
        assert found["seconds"][kind] == pytest.approx(measured, rel=0.12)  # of the logs
    assert {operation.task.kind for operation in log if operation.task} == {*LANES, HOST}


def test_placements_stay_where_memory_is_limited() -> None:
    """What is loaded already counts as free: the same slots fit in every update."""
    counts = [10**8] * 8
    placer = Placer(group_sizes(counts), interleaved=True)
    slot, found = 12 * 10**8, []
    for loaded in (0, 2, 2, 0, 2):
        free = 2.5 * slot - loaded * slot
        placer.updates = 0
        placer.end_update(free + loaded * slot)
        found.append(sum(placer.placement))
    assert len(set(found)) == 1
    assert found[0] > 0
    placer.updates = 0
    placer.end_update(0.5 * slot)
    assert not any(placer.placement)


def test_a_rank_without_groups_places_with_the_others() -> None:
    placer = Placer([], interleaved=True)
    placer.end_update(float("inf"))
    placer.end_update(-1.0)
    assert placer.placement == []


def test_groups_that_pipeline_stages_share_stay_on_the_host() -> None:
    placer = Placer(group_sizes([10**6] * 6), interleaved=True)
    placer.place(2)
    assert any(placer.placement)
    chosen = [group for group, on_device in enumerate(placer.placement) if on_device]
    placer.keep_on_host(chosen)
    assert not any(placer.placement)
    placer.place(2)
    assert any(placer.placement)
    assert not any(placer.placement[group] for group in chosen)
