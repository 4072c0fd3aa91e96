"""The stash: tensors that backward needs, in the host's memory from forward until shortly before.

A tensor is copied out while the passes go on, and its memory on the device is free from the point
at which a few others have been put. Whoever takes one launches the copies back of those that
backward needs next. With n the inputs of norms, and x those of sub-blocks:

    passes   n0 x0 | n1 x1 | n2 x2 | n3 x3 |  loss  | x3   n3 | x2   n2 | x1   n1 | x0   n0
    stash       n0  x0 n1  x1 n2  x2 n3  x3
    fetch                                                       x1        n1 x0     n0

Two orders are enough. A copy begins behind what the passes have queued: they make the tensor, and
use before it the memory to which it comes back. And the passes wait for the copy of a tensor before
they use it, and before its memory is free, on the device or on the host.
"""

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from colonnade.parallel.lanes.cuda import CudaLanes
from colonnade.parallel.lanes.pinned import PinnedMemoryError, pinned_bytes
from colonnade.parallel.lanes.tasks import (
    FETCH,
    STASH,
    STASH_LANES,
    Event,
    ImmediateLanes,
    Lanes,
    Run,
    Task,
)
from colonnade.parallel.tensor import wait

# Tensors that stay on the device at the end of a forward pass, as those of two sub-blocks with
# norms do: backward begins with them, and a copy may take as long as a sub-block without delay.
IN_FLIGHT = 4


def lanes_of(device: torch.device) -> Lanes:
    """Returns new lanes of a device for a stash."""
    if device.type == "cuda":
        return CudaLanes(device, kinds=STASH_LANES)
    return ImmediateLanes()


def host_bytes(size: int, device: torch.device) -> Tensor:
    """Allocates bytes of the host, `[size]`, for copies of a device; those of a GPU are pinned.

    Raises:
        PinnedMemoryError: the host does not pin them.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    memory, status = pinned_bytes(size)
    if status:
        raise PinnedMemoryError(
            f"train.offload_inputs: the host does not pin {size / 2**20:.1f} MiB more (CUDA error "
            f"{status}; see `ulimit -l` and the container's memory limit); raise the limit, use "
            "more ranks, or leave train.offload_inputs out"
        )
    return memory


class Pool:
    """Buffers of the host, which are never freed: a step has as many tensors as the one before.

    Pinning waits for the device, so new ones are allocated in forward passes alone, and in a run
    whose shapes do not change in the first step alone.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.unused: dict[int, list[Tensor]] = defaultdict(list)  # by size

    def take(self, size: int, device: torch.device) -> Tensor:
        """Returns a buffer of this many bytes."""
        if unused := self.unused[size]:
            return unused.pop()
        self.buffers.append(host_bytes(size, device))
        return self.buffers[-1]

    def give_back(self, buffer: Tensor) -> None:
        """Takes a buffer back, for whose last copy the passes wait."""
        self.unused[buffer.numel()].append(buffer)


class Stashed:
    """A tensor in the stash, whose buffer of the host is used again when nobody has this object.

    Attributes:
        tensor: on the device, until it has been copied out, and again from its way back to its use.
        event: the end of its last copy.
        ends: whether fetching in advance ends with it.
        taken: whether backward has used it.
    """

    def __init__(self, stash: "Stash", tensor: Tensor, ends: bool) -> None:
        self.stash, self.lanes, self.previous = stash, stash.lanes(tensor.device), stash.newest
        self.ends, self.taken = ends, False
        self.device, self.dtype, self.shape = tensor.device, tensor.dtype, tensor.shape
        self.buffer = stash.pool.take(tensor.nbytes, tensor.device)
        self.tensor: Tensor | None = tensor
        self.event = self.launch(STASH, self.copy_out)

    def __del__(self) -> None:
        """Frees the buffer, and the tensor if it came back and was not taken."""
        if hasattr(self, "event"):  # else it was never made
            self.release()
            self.stash.pool.give_back(self.buffer)

    @property
    def copy(self) -> Tensor:
        """The copy on the host."""
        return self.buffer.view(self.dtype).view(self.shape)

    def launch(self, kind: str, run: Run) -> Event:
        """Launches a copy behind what the passes have queued; returns the event of its end."""
        task = Task(kind, self.stash.count, self.buffer.numel())
        return self.lanes.launch(task, run, [self.lanes.ready()])

    def copy_out(self) -> None:
        """Copies the tensor to the host."""
        assert self.tensor is not None, "a tensor was freed before it was copied"
        self.copy.copy_(self.tensor, non_blocking=True)

    def copy_back(self) -> None:
        """Copies it to the device."""
        assert self.tensor is not None, "a tensor was freed before it came back"
        self.tensor.copy_(self.copy, non_blocking=True)

    def fetch(self) -> None:
        """Launches its copy back, unless it is on the device."""
        if self.tensor is None:
            self.tensor = self.stash.allocate(self.shape, dtype=self.dtype, device=self.device)
            self.event = self.launch(FETCH, self.copy_back)

    def fetch_before(self) -> None:
        """Launches the copies back of those that were put before, up to the first that `ends`."""
        one = None if self.previous is None else self.previous()
        while one is not None:
            if not one.taken:
                one.fetch()
            if one.ends or one.previous is None:
                return
            one = one.previous()

    def release(self) -> Tensor | None:
        """Returns the tensor on the device, which from now on the passes may use, and free."""
        if self.tensor is not None:
            self.lanes.passes_wait(self.event)
        tensor, self.tensor = self.tensor, None
        return tensor

    def take(self) -> Tensor:
        """Returns the tensor, for backward; again if backward runs again."""
        self.fetch()
        self.fetch_before()
        self.taken = True
        self.stash.forget(self)
        tensor = self.release()
        assert tensor is not None
        return tensor


class Stash:
    """Tensors of any number of forward passes, whose backward passes may run in any order.

    Args:
        new_lanes: makes the lanes of the device that has the tensors.
        allocate: allocates a tensor on a device, as `torch.empty` does.
    """

    def __init__(
        self,
        new_lanes: Callable[[torch.device], Lanes] = lanes_of,
        allocate: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self.new_lanes, self.allocate, self.pool, self.count = new_lanes, allocate, Pool(), 0
        self.by_device: dict[torch.device, Lanes] = {}
        self.leaving: deque[Stashed] = deque()
        self.newest: weakref.ref[Stashed] | None = None

    def lanes(self, device: torch.device) -> Lanes:
        """Returns the lanes of a device."""
        if device not in self.by_device:
            self.by_device[device] = self.new_lanes(device)
        return self.by_device[device]

    def put(self, tensor: Tensor, ends: bool) -> Stashed:
        """Launches the copy of a tensor to the host; frees, where `IN_FLIGHT` others are on their
        way, the memory of the one that has been for longest.

        Args:
            tensor: of any shape and dtype; nothing writes to it.
            ends: whether fetching in advance ends with it, as with the input of a sub-block.
        """
        self.count += 1
        stashed = Stashed(self, wait(tensor.detach()).contiguous(), ends)
        self.newest = weakref.ref(stashed)
        self.leaving.append(stashed)
        if len(self.leaving) > IN_FLIGHT:
            self.leaving.popleft().release()
        return stashed

    def forget(self, stashed: Stashed) -> None:
        """Leaves the memory of a tensor to whoever has taken it."""
        if stashed in self.leaving:
            self.leaving.remove(stashed)

    def on_device(self) -> Sequence[Tensor]:
        """Returns the tensors that a forward pass has left on the device, which the next frees."""
        return [one.tensor for one in self.leaving if one.tensor is not None]

    def on_host(self) -> Sequence[Tensor]:
        """Returns the memory of the host."""
        return self.pool.buffers
