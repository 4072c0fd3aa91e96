"""Counts the bytes of the storages that operators allocate and free, by what they hold."""

import functools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.parallel.collectives import BOOKKEEPING, OPAQUE, has, inside_opaque
from colonnade.parallel.gradients import local

ACTIVATIONS, GATHERED, STASHED = "activations", "gathered", "stashed"


@dataclass(frozen=True)
class Peak:
    """The most bytes that were allocated at once, and what they held then."""

    total: int
    by_kind: Mapping[str, int]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the local storages of these tensors, each counted once."""
    storages = {s._cdata: s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}
    return sum(storages.values())


class StorageLedger(TorchDispatchMode):
    """Keeps a ledger of the storages that operators allocate, while it is active.

    Storages that exist before are known by `hold`. What is allocated is `activations`, but for the
    weights that FSDP2 all-gathers, and the buffers of its collectives, which are `gathered`; FSDP2
    frees and allocates the storage of a weight by resizing it, which is noticed when the next one
    is allocated. Temporary storages within operators are not seen, nor those of operators on
    DTensors, which compute shapes with tensors of the global shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # a storage's number, and the change of its bytes
        self.kinds: dict[int, str] = {}  # of storages by number, other than activations
        self.live: dict[int, tuple[int, int]] = {}  # by address: number and bytes
        self.references: dict[int, weakref.ref] = {}
        self.gathered: dict[int, weakref.ref] = {}  # the storages that FSDP2 resizes
        self.count = 0

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what the storages of these tensors hold; also after they were allocated."""
        for t in tensors:
            self.kinds[self.record(local(t))] = kind

    def record(self, t: Tensor) -> int:
        """Enters the storage of a tensor, or the change of its size; returns its number."""
        storage = t.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        number, before = self.live.get(address, (None, 0))
        if number is not None and size == before:
            return number
        self.record_resized()  # what was freed before this is allocated
        if number is None:
            number, self.count = self.count, self.count + 1
            freed = functools.partial(self.freed, address)
            self.references[address] = weakref.ref(storage, freed)
        self.events.append((number, size - before))
        self.live[address] = number, size
        return number

    def freed(self, address: int, _: weakref.ref) -> None:
        """Enters that a storage was freed."""
        number, size = self.live.pop(address)
        self.events.append((number, -size))
        self.references.pop(address)
        self.gathered.pop(address, None)

    def record_gathered(self, tensors: Iterable[Tensor]) -> None:
        """Enters storages of FSDP2, which it may resize."""
        for t in tensors:
            self.kinds[self.record(t)] = GATHERED
            storage = t.untyped_storage()
            self.gathered[storage._cdata] = weakref.ref(storage)

    def record_resized(self) -> None:
        """Enters which storages FSDP2 has emptied since the last operator."""
        for address, reference in list(self.gathered.items()):
            storage, (number, before) = reference(), self.live[address]
            if storage is not None and storage.nbytes() != before:
                self.events.append((number, storage.nbytes() - before))
                self.live[address] = number, storage.nbytes()
            if storage is None or not storage.nbytes():
                del self.gathered[address]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in BOOKKEEPING:
            return func(*args, **kwargs)
        if has(types, AsyncCollectiveTensor):
            return NotImplemented
        if func in OPAQUE:
            return inside_opaque(self, func, args, kwargs)
        result = func(*args, **kwargs)
        if func.namespace == "fsdp":
            self.record_gathered(fsdp_buffers(func, args, kwargs))
        elif func is torch.ops.aten.cat.out:  # what it has gathered along another dimension than 0
            self.record_gathered([kwargs["out"]])
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.record(local(t))
        return result

    def mark(self) -> int:
        """A point in time, for `peak`: the number of events so far."""
        self.record_resized()
        return len(self.events)

    def held(self, at: int) -> dict[str, int]:
        """Bytes at this point in time, by kind."""
        bytes_of: dict[str, int] = defaultdict(int)
        for number, change in self.events[:at]:
            bytes_of[self.kinds.get(number, ACTIVATIONS)] += change
        return dict(bytes_of)

    def peak(self, start: int, stop: int, kinds: tuple[str, ...]) -> Peak:
        """The peak of storages of these kinds between two points in time."""
        held = self.held(start)
        best = dict(held)

        def total(by_kind: Mapping[str, int]) -> int:
            return sum(by_kind.get(kind, 0) for kind in kinds)

        running = highest = total(held)
        for number, change in self.events[start:stop]:
            kind = self.kinds.get(number, ACTIVATIONS)
            held[kind] = held.get(kind, 0) + change
            running += change if kind in kinds else 0
            if running > highest:
                highest, best = running, dict(held)
        return Peak(highest, {kind: best.get(kind, 0) for kind in kinds})


def fsdp_buffers(operator: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The buffers and weights that an operator of FSDP2 writes."""
    if operator.overloadpacket.__name__ == "all_gather_copy_in":
        return [args[1]]
    out = kwargs["out"]
    return out if isinstance(out, list) else [out]
