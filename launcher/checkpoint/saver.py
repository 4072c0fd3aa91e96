"""Saves checkpoints: at once, or in a thread while training goes on.

    main thread     begin: copy buffers | forward, backward | wait | update | …
    thread of save                copy the rest to the host ^ write, sync, checksum | commit

Every rank writes the chunks of its plan to one file. When all files are on the disk, rank 0 writes
catalog, state and manifest, and renames the folder: it exists whole or not at all.
"""

import errno
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from colonnade.launcher.checkpoint import folders
from colonnade.launcher.checkpoint.check import check_savable
from colonnade.launcher.checkpoint.copies import HostCopies, on_host
from colonnade.launcher.checkpoint.folders import STATE, TENSORS, write_durably
from colonnade.launcher.checkpoint.manifest import FileRecord, checksums, write_manifest
from colonnade.launcher.checkpoint.plan import Tensors, WritePlan, file_of, make_plan, signature
from colonnade.launcher.checkpoint.write import write_tensors
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero, rank
from colonnade.launcher.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A slow disk is no fault for an hour; the death of a rank breaks the connections at once.
WRITE_TIMEOUT = timedelta(hours=1)


@dataclass
class Save:
    """A checkpoint that is being saved, or was.

    Attributes:
        folder: of it.
        bytes: of all its tensors.
        blocked: seconds for which training has waited.
        seconds: from its beginning to its commit.
        failure: why it is not complete, the same on every rank.
        thread: that saves it.
        waiting: when training began to wait for its end; None: it does not.
    """

    folder: Path
    bytes: int
    blocked: float = 0.0
    seconds: float = 0.0
    failure: Exception | None = None
    thread: threading.Thread | None = None
    waiting: float | None = None

    def blocked_so_far(self) -> float:
        """Seconds for which training has waited, up to now if it waits."""
        waiting = 0.0 if self.waiting is None else time.perf_counter() - self.waiting
        return self.blocked + waiting


class Content(NamedTuple):
    """What a checkpoint will hold: its plan, the texts of its state and of what is said about it,
    and a function that returns this rank's chunks in the host's memory."""

    plan: WritePlan
    state_json: str
    about: dict[str, Any]
    chunks: Callable[[], dict[str, torch.Tensor]]


class Saver:
    """Saves checkpoints of one run, at most one at a time. `begin` and `finish` are collective.

    Args:
        asynchronous: save in a thread, from copies in the host's memory, which are as large as what
            this rank writes. Otherwise `begin` returns when the checkpoint is complete.
        committed: rank 0 calls it once a checkpoint is complete, in the thread.
        patience: seconds for which a save in flight is awaited after training has failed: a host
            that was lost breaks no connections.
    """

    def __init__(
        self,
        asynchronous: bool = False,
        committed: Callable[[Save], None] | None = None,
        patience: float | None = None,
    ) -> None:
        self.committed, self.patience = committed, patience
        self.plan: WritePlan | None = None
        self.signature: tuple[tuple[object, ...], ...] | None = None
        self.copies = HostCopies() if asynchronous else None
        self.group: dist.ProcessGroup | None = None  # None: the default one
        self.in_flight: Save | None = None

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed, as far as this rank knows; `finish` raises it."""
        return self.in_flight is not None and self.in_flight.failure is not None

    @property
    def copying(self) -> bool:
        """Whether the save in flight still reads tensors, so that they must not change."""
        in_flight = self.in_flight is not None and self.copies is not None
        return in_flight and not cast(HostCopies, self.copies).complete.is_set()

    def begin(
        self,
        folder: Path,
        tensors: Tensors,
        state: dict[str, Any],
        about: dict[str, Any] | None = None,
        changing: Collection[str] = (),
    ) -> Save:
        """Begins to save a checkpoint, after the end of an earlier one that is in flight.

        Args:
            folder: where it will be (`step_folder(run, step)`), on a disk that all ranks share. A
                checkpoint of that name is replaced, and kept until the new one is complete.
            tensors: by name, plain tensors or DTensors of any dtype, mesh and placement but
                Partial. A chunk that several ranks hold is written by the lowest of them. Ranks may
                hold different names (stages of a pipeline).
            state: other values to save, as JSON (finite numbers only); rank 0's is written.
            about: what the manifest says of the checkpoint; rank 0's is written.
            changing: names of tensors that may change as soon as this returns; all others stay as
                they are until `wait` has returned.

        Raises:
            UserError: the disk refused the earlier one, or, without a thread, this one. The same on
                every rank; checkpoints that were complete are as they were.
        """
        start = time.perf_counter()
        self.finish()
        plan, state_json = self._agree(tensors, state)
        chunks = plan.chunks(tensors)
        save = Save(folder, plan.bytes)
        if self.group is None and dist.is_initialized() and dist.get_world_size() > 1:
            # the thread must not use the groups of training, nor writing their time-out
            self.group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        if self.copies is None:
            content = Content(plan, state_json, about or {}, lambda: on_host(chunks))
            save.waiting = start
            self._write(save, content, start)
            save.blocked, save.waiting = save.seconds, None
            return save
        at_once = {key for key in chunks if key.partition("@")[0] in set(changing)}
        self.copies.begin(chunks, at_once)
        content = Content(plan, state_json, about or {}, self.copies.finish)
        save.thread = threading.Thread(
            target=self._in_thread, args=(save, content, start), name="save", daemon=True
        )
        self.in_flight = save
        save.blocked = time.perf_counter() - start
        save.thread.start()
        return save

    def wait(self) -> None:
        """Returns when the tensors of the save in flight may change. Not collective."""
        if self.in_flight is not None and self.copies is not None:
            start = time.perf_counter()
            self.copies.wait()
            self.in_flight.blocked += time.perf_counter() - start

    def finish(self) -> None:
        """Waits for the save in flight, if there is one.

        Raises:
            UserError: the disk refused it, the same on every rank.
        """
        if (save := self.in_flight) is None or save.thread is None:
            return
        save.waiting = time.perf_counter()
        save.thread.join()
        save.blocked, save.waiting = save.blocked_so_far(), None
        self.in_flight = None
        if save.failure is not None:
            raise save.failure

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the save in flight also where training failed: a checkpoint that is nearly
        complete is the best there is. Raises its failure unless another exception is on its way."""
        save = self.in_flight
        if kind is None:
            self.finish()
            if self.group is not None:
                dist.destroy_process_group(self.group)
                self.group = None
        elif save is not None and save.thread is not None:
            save.thread.join(self.patience)
            failure: object = save.failure
            if save.thread.is_alive():
                failure = f"the checkpoint {save.folder} was given up: it is not complete"
            if failure is not None:
                print(f"colonnade: {failure}", file=sys.stderr)

    def _in_thread(self, save: Save, content: Content, start: float) -> None:
        """Copies and writes; keeps a failure for `finish`, which raises it."""
        try:
            self._write(save, content, start)
        except Exception as failure:
            save.failure = failure
        finally:
            if self.copies is not None:
                self.copies.complete.set()  # also where nothing was copied: `wait` must not hang

    def _agree(self, tensors: Tensors, state: dict[str, Any]) -> tuple[WritePlan, str]:
        """Returns the plan of the last checkpoint, or a new one where any rank's tensors differ,
        and the state as text; all ranks raise where one of them cannot be saved."""
        texts: list[str] = []

        def changed() -> bool:
            check_savable(tensors)
            texts.append(json.dumps(state, allow_nan=False))
            return signature(tensors) != self.signature

        if any(on_all_ranks(changed)) or self.plan is None:
            self.plan, self.signature = make_plan(tensors), signature(tensors)
        return self.plan, texts[0]

    def _write(self, save: Save, content: Content, start: float) -> None:
        """Writes this rank's file and, on rank 0, the rest. Collective over the group of saves.

        Raises:
            UserError: the disk refused; `folder.partial` is removed then.
        """
        partial, chunks = folders.partial(save.folder), dict[str, torch.Tensor]()
        # first of all, because training waits for the copies before it may change the tensors
        on_all_ranks(lambda: chunks.update(content.chunks()), group=self.group)
        try:
            on_rank_zero(lambda: folders.prepare(save.folder), self.group)
            written = on_all_ranks(lambda: write_chunks(partial, chunks), group=self.group)
            on_rank_zero(lambda: commit(save.folder, content, written), self.group)
        except OSError as error:
            refused = error
            message = on_rank_zero(
                lambda: clean_up_and_explain(save.folder, refused, save.bytes), self.group
            )
            raise UserError(message) from None
        save.seconds = time.perf_counter() - start
        if self.committed is not None:
            committed = self.committed
            on_rank_zero(lambda: committed(save), self.group)


def write_chunks(folder: Path, chunks: dict[str, torch.Tensor]) -> dict[str, FileRecord]:
    """Writes this rank's chunks to one file, waits until it is on the disk, and reads it again.

    Returns:
        the file's record by its name; nothing where there are no chunks.

    Raises:
        OSError: with its errno, where the disk refuses.
    """
    if not chunks:
        return {}
    folder.mkdir(exist_ok=True)  # this rank's node may not see it yet
    path = folder / file_of(rank())
    return {path.name: write_tensors(path, chunks)}


def commit(folder: Path, content: Content, written: Sequence[dict[str, FileRecord]]) -> None:
    """Writes catalog, state and manifest, and gives the partial folder its name (rank 0)."""
    partial = folders.partial(folder)
    files = {name: record for of_rank in written for name, record in of_rank.items()}
    for name in files:
        if not (partial / name).is_file():
            reason = "not visible to rank 0: every node must share the folder of the run"
            raise FileNotFoundError(errno.ENOENT, reason, str(partial / name))
    assert content.plan.catalog is not None  # on rank 0
    write_durably(partial / TENSORS, content.plan.catalog.model_dump_json())
    write_durably(partial / STATE, content.state_json)
    files |= {name: checksums(partial / name) for name in (TENSORS, STATE)}
    write_manifest(partial, content.about, dict(sorted(files.items())))
    folders.commit(folder)
    folders.finish_replacement(folder)


def clean_up_and_explain(folder: Path, failure: OSError, needed_bytes: int) -> str:
    """Removes the partial folder of a failed save and returns the user's message (rank 0)."""
    # A disk that refuses this as well keeps the partial folder, which the next save removes.
    with suppress(OSError):
        folders.finish_replacement(folder)
        if folders.partial(folder).exists():
            shutil.rmtree(folders.partial(folder))
    run = next(path for path in folder.absolute().parents if path.exists())
    space = ""
    if failure.errno in _DISK_FULL:
        free_bytes = shutil.disk_usage(run).free
        space = (
            f" It needs more than {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} are "
            "free there."
        )
        remedy = f"Free space on the disk of {run}, or lower checkpoint.keep"
    else:
        remedy = f"See that {run} can be written to, from every node"
    last = folders.newest(folder.parent)
    intact = f"The last good checkpoint, {last}, is intact." if last else "There is none before it."
    return (
        f"could not save the checkpoint {folder}: {failure.strerror} ({failure.filename})."
        f"{space} {intact} {remedy}, then resume."
    )


def format_bytes(count: int) -> str:
    """Formats a number of bytes in the largest binary unit that it reaches."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
