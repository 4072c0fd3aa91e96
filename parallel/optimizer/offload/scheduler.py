"""The order of a step with offloaded state: which operation is queued when, and what it waits for.

A group is updated on the device or on the host. With two slots on the device, groups 0, 2, 4 on it
and groups 1, 3 on the host:

    gradient  1 3                                 during the last backward pass
    load      0 2 .  4                            0 and 2 while the norm is not known yet, if there
    update        0 2   4                         is memory for them; 4 when 0 has left its slot
    store           0 2   4
    host          1---3---
    weights           1   3
                                ^ the step is done: everything has been flushed
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from colonnade.parallel.lanes.tasks import (
    GRADIENT,
    HOST,
    LOAD,
    STORE,
    UPDATE,
    WEIGHTS,
    Event,
    Lanes,
    Task,
)


@dataclass(frozen=True)
class GroupSize:
    """What a rank holds of a group.

    Attributes:
        parameters: of its shards.
        state: bytes of master weights and moments.
        gradients: bytes of each parameter's gradient on its way to the host.
        weights: bytes of the weights on the device.
        scratch: bytes of temporary tensors of an update on the device.
    """

    parameters: int
    state: int
    gradients: tuple[int, ...]
    weights: int
    scratch: int = 0


class Work(Protocol):
    """What the operations of a group do; the scheduler knows only their order."""

    def has_gradient(self, group: int, index: int) -> bool:
        """Whether the device holds the gradient of a parameter of the group."""

    def copy_gradient(self, group: int, index: int) -> None:
        """Copies the gradient of a parameter to the host."""

    def drop_gradient(self, group: int, index: int) -> None:
        """Frees the gradient of a parameter on the device, once it has been copied."""

    def allocate(self, size: int) -> Any:
        """Allocates memory for the state of a group on the device."""

    def load(self, group: int, memory: Any) -> None:
        """Copies master weights and moments to the device."""

    def update(self, group: int, memory: Any) -> None:
        """Updates them in a slot from the gradients, and writes the weights."""

    def store(self, group: int, memory: Any) -> None:
        """Copies master weights and moments back."""

    def update_on_host(self, group: int, indices: Sequence[int]) -> None:
        """Updates those of these parameters on the host from the copied gradients, and rounds the
        weights there."""

    def copy_weights(self, group: int, indices: Sequence[int]) -> None:
        """Copies their weights to the device."""


@dataclass
class Slot:
    """Memory on the device for the state of one group at a time; `free` is the event from which on
    the next group may use it."""

    memory: Any
    free: Event


@dataclass
class Scheduler:
    """Runs the operations of one step after the other.

    Attributes:
        lanes: of the device.
        work: what the operations do.
        sizes: of the groups, in the order in which backward completes their gradients.
        allows: whether the device has memory for so many bytes more at this moment; it is asked
            before every allocation.
        most_slots: the most slots on the device at once.
    """

    lanes: Lanes
    work: Work
    sizes: Sequence[GroupSize]
    allows: Callable[[int], bool]
    most_slots: int = 2
    on_device: list[bool] = field(default_factory=list)
    slots: int = 0  # allocated in this step
    free: deque[Slot] = field(default_factory=deque)
    waiting: deque[int] = field(default_factory=deque)  # groups whose state is to be loaded
    loaded: dict[int, tuple[Slot, Event]] = field(default_factory=dict)
    copied: dict[int, dict[int, Event]] = field(default_factory=lambda: defaultdict(dict))
    leaving: deque[tuple[int, int]] = field(default_factory=deque)  # gradients, as they were queued

    def begin(self, on_device: Sequence[bool]) -> None:
        """Begins a step in which these groups are updated on the device, unless it has begun."""
        if self.on_device:
            return
        self.on_device = list(on_device)
        self.waiting = deque(group for group, chosen in enumerate(on_device) if chosen)

    @property
    def slot_size(self) -> int:
        """Bytes of a slot: of the largest group that is updated on the device."""
        marked = zip(self.sizes, self.on_device, strict=True)
        return max((size.state for size, chosen in marked if chosen), default=0)

    @property
    def slot_need(self) -> int:
        """Bytes that the device must have free for one more slot."""
        return self.slot_size + max((size.scratch for size in self.sizes), default=0)

    def send_gradient(self, group: int, index: int) -> None:
        """Queues the copy of a gradient, which is complete, to the host."""
        task = Task(GRADIENT, group, self.sizes[group].gradients[index])
        run = partial(self.work.copy_gradient, group, index)
        self.copied[group][index] = self.lanes.launch(task, run, [self.lanes.ready()])
        self.leaving.append((group, index))
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Frees the gradients that have been copied."""
        while self.leaving:
            group, index = self.leaving[0]
            if not self.lanes.passed(self.copied[group][index]):
                return
            self.work.drop_gradient(*self.leaving.popleft())

    def prefetch(self) -> None:
        """Queues loads of the next groups, as far as the device has memory for them now: it is
        called when all passes have been queued, whose memory is free behind them."""
        while self.waiting and self.slots < self.most_slots and self.allows(self.slot_need):
            group, slot = self.waiting.popleft(), self.new_slot()
            self.loaded[group] = slot, self.load(group, slot)

    def new_slot(self) -> Slot:
        """Allocates a slot, which may be used when all has run that had its memory before."""
        self.slots += 1
        return Slot(self.work.allocate(self.slot_size), self.lanes.ready())

    def next_slot(self) -> Slot:
        """Returns a new slot if the device has memory, else the one that is free first. The first
        is allocated whatever the margin is: the placement was made for it."""
        if not self.slots or (self.slots < self.most_slots and self.allows(self.slot_need)):
            return self.new_slot()
        return self.free.popleft()

    def load(self, group: int, slot: Slot) -> Event:
        """Queues the load of a group into a slot, behind the store of the group before it."""
        task = Task(LOAD, group, self.sizes[group].state)
        return self.lanes.launch(task, partial(self.work.load, group, slot.memory), [slot.free])

    def step(self, on_device: Sequence[bool]) -> None:
        """Updates every group, and returns when all state and all weights are in their places.

        Operations of the device are all queued before the first update on the host, so that they
        run at the same time. `on_device` is the argument of `begin`, which it calls where no
        gradient was expected during backward.
        """
        self.begin(on_device)
        passes = self.lanes.ready()
        host = [group for group, chosen in enumerate(self.on_device) if not chosen]
        for group in host:
            self.send_missing_gradients(group)
        for group in (group for group, chosen in enumerate(self.on_device) if chosen):
            self.update_on_device(group, passes)
        ends = [self.update_on_host(group, passes) for group in host]
        for event in ends + [slot.free for slot in self.free]:
            self.lanes.wait(event)
        self.end()

    def update_on_device(self, group: int, passes: Event) -> None:
        """Queues the update of a group on the device: its load, unless it is loaded, the update
        behind the passes and the sums that complete gradients after them, and the store."""
        if group in self.loaded:
            slot, loaded = self.loaded.pop(group)
        else:
            self.waiting.popleft()
            slot = self.next_slot()
            loaded = self.load(group, slot)
        task = Task(UPDATE, group, self.sizes[group].parameters)
        run = partial(self.work.update, group, slot.memory)
        updated = self.lanes.launch(task, run, [loaded, passes])
        task = Task(STORE, group, self.sizes[group].state)
        run = partial(self.work.store, group, slot.memory)
        slot.free = self.lanes.launch(task, run, [updated])
        self.free.append(slot)

    def send_missing_gradients(self, group: int) -> None:
        """Queues the copies of a group's gradients that could not leave during backward."""
        for index in range(len(self.sizes[group].gradients)):
            if index not in self.copied[group] and self.work.has_gradient(group, index):
                self.send_gradient(group, index)

    def wait_for_gradient(self, group: int, index: int) -> None:
        """Returns when the gradient of a parameter is on the host."""
        self.lanes.wait(self.copied[group][index])

    def update_on_host(self, group: int, passes: Event) -> Event:
        """Updates a group on the host, when its gradients are there, and queues the copy of its
        weights, behind the passes that use the old ones."""
        for event in self.copied[group].values():
            self.lanes.wait(event)
        self.drop_gradients()
        indices = sorted(self.copied[group])
        task = Task(HOST, group, self.sizes[group].parameters)
        self.lanes.run_on_host(task, partial(self.work.update_on_host, group, indices))
        task = Task(WEIGHTS, group, self.sizes[group].weights)
        return self.lanes.launch(task, partial(self.work.copy_weights, group, indices), [passes])

    def discard(self) -> None:
        """Ends the step without an update: waits for the copies in flight, which change nothing
        that stays."""
        for events in self.copied.values():
            for event in events.values():
                self.lanes.wait(event)
        for _, event in self.loaded.values():
            self.lanes.wait(event)
        self.end()

    def end(self) -> None:
        """Frees the gradients and the slots of a step whose events have all passed."""
        self.drop_gradients()
        assert not self.leaving, "a gradient was still being copied at the end of its step"
        self.lanes.finish()
        self.slots = 0
        self.free.clear()
        self.waiting.clear()
        self.loaded.clear()
        self.copied.clear()
        self.on_device = []
