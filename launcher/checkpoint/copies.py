"""Copies what a rank writes to its host's memory, while the next step runs."""

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

Chunks = Mapping[str, torch.Tensor]


@dataclass
class HostCopies:
    """Memory of the host for the chunks that a rank writes, used again by every checkpoint.

    From `begin` to `finish` the chunks must not change, but for those that `begin` copies at once.
    Chunks on a GPU are copied on a stream of its own, and `wait` makes the current stream wait;
    those on the CPU by `finish`, which a thread calls, and `wait` blocks until it has.

    Attributes:
        copies: by key.
        pending: chunks that `finish` will copy on the CPU.
        complete: is set when no chunk will be read any more.
        copied: recorded behind the copies on a GPU.
        device: the GPU.
        waits_for_thread: whether `finish` copies chunks.
    """

    copies: dict[str, torch.Tensor] = field(default_factory=dict)
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    complete: threading.Event = field(default_factory=threading.Event)
    copied: torch.cuda.Event | None = None
    device: torch.device | None = None
    waits_for_thread: bool = True

    def begin(self, chunks: Chunks, at_once: Collection[str]) -> None:
        """Copies the chunks whose keys are in `at_once`, and begins to copy the others."""
        self.complete.clear()
        self.allocate(chunks)
        on_gpu = {key: chunk for key, chunk in chunks.items() if chunk.device.type == "cuda"}
        if on_gpu:
            (device,) = {chunk.device for chunk in on_gpu.values()}
            self.begin_on_gpu(on_gpu, [key for key in at_once if key in on_gpu], device)
        on_cpu = {key: chunk for key, chunk in chunks.items() if key not in on_gpu}
        for key in at_once:
            if key in on_cpu:
                self.copies[key].copy_(on_cpu.pop(key))
        self.pending = on_cpu
        self.waits_for_thread = bool(on_cpu)

    def begin_on_gpu(self, chunks: Chunks, at_once: Collection[str], device: torch.device) -> None:
        """Queues all copies on a stream; the current stream waits for those in `at_once` alone."""
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for key in sorted(chunks, key=lambda key: key not in at_once):
                self.copies[key].copy_(chunks[key], non_blocking=True)
                chunks[key].record_stream(stream)
                if key in at_once:
                    current.wait_event(stream.record_event())
        self.copied, self.device = stream.record_event(), device

    def wait(self) -> None:
        """Returns when the chunks may change: on a GPU, for work that the current stream does."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        if self.waits_for_thread:
            self.complete.wait()

    def finish(self) -> dict[str, torch.Tensor]:
        """Returns the copies, once they are complete."""
        try:
            for key, chunk in self.pending.items():
                self.copies[key].copy_(chunk)
            if self.copied is not None:
                torch.cuda.set_device(self.device)  # of this thread
                self.copied.synchronize()
        finally:
            self.pending = {}
            self.complete.set()
        return self.copies

    def allocate(self, chunks: Chunks) -> None:
        """Allocates memory for chunks, unless that of the last checkpoint fits them."""
        if {key: (t.shape, t.dtype) for key, t in self.copies.items()} == {
            key: (t.shape, t.dtype) for key, t in chunks.items()
        }:
            return
        self.copies = {
            key: torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=chunk.device.type == "cuda")
            for key, chunk in chunks.items()
        }


def on_host(chunks: Chunks) -> dict[str, torch.Tensor]:
    """Returns the chunks in the host's memory, without a copy of those that are there and whole."""
    storages: set[int] = set()
    found: dict[str, torch.Tensor] = {}
    for key, chunk in chunks.items():
        tensor = chunk.cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # tied or sliced: safetensors refuses shared memory
        storages.add(tensor.untyped_storage().data_ptr())
        found[key] = tensor
    return found
