"""Checkpoints on disk: safetensors and JSON, committed atomically, loaded onto any layout.

A checkpoint is a folder `step-NNNNNNNN/`. It holds `rank-NNNNN.safetensors` from each rank that
writes, `tensors.json` (dtype, global shape and chunks of every tensor) and `state.json` (the
caller's state). Nothing in it is pickled. A folder of that name is always complete: it is written
as `step-NNNNNNNN.partial` and renamed once all its files are on the disk.

    save(step_folder(run, step), tensors, {"step": step})
    state = load(newest(run), tensors)
"""

import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from colonnade.launcher.checkpoint import catalog, folders
from colonnade.launcher.checkpoint.check import check_fits, check_savable
from colonnade.launcher.checkpoint.folders import is_complete, newest, prune, step_folder
from colonnade.launcher.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.errors import UserError

__all__ = ["is_complete", "load", "newest", "prune", "read_state", "save", "step_folder"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Writes a checkpoint; every rank of the default process group, if there is one, must call it.

    Gathers the ranks' save plans and write results on rank 0; broadcasts rank 0's outcome. The
    tensors themselves do not travel: each rank writes its own chunks.

    Args:
        folder: where it will be (`step_folder(run, step)`), on a disk that all ranks share. A
            complete checkpoint of that name is replaced, and kept until the new one is complete.
        tensors: by name, plain tensors or DTensors of any dtype, mesh and placement but Partial.
            A chunk that several ranks hold is written by the lowest of them. Ranks may hold
            different names (stages of a pipeline). A rank copies the chunks that it writes to its
            host's memory.
        state: other values to save, as JSON (finite numbers only); rank 0's is written.

    Raises UserError, the same on every rank, where the disk refuses: `folder.partial` is removed
    and the complete checkpoints are as they were.
    """
    on_all_ranks(lambda: check_savable(tensors))
    writer = SafetensorsWriter(folders.partial(folder))
    try:
        state_json = on_rank_zero(lambda: _prepare(folder, state))
        with _no_group_warning_ignored(), torch.no_grad():
            planner = dcp.DefaultSavePlanner(
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
                dedup_save_to_lowest_rank=True,
            )
            dcp.save(dict(tensors), storage_writer=writer, planner=planner)
        on_rank_zero(lambda: _commit(folder, state_json))
    except (OSError, CheckpointException) as error:
        failure = _disk_failure(error)
        message = on_rank_zero(lambda: _clean_up_and_explain(folder, failure, writer.needed_bytes))
        raise UserError(message) from None
    on_rank_zero(lambda: folders.finish_replacement(folder))


def load(folder: Path, tensors: dict[str, torch.Tensor], partial: bool = False) -> dict[str, Any]:
    """Fills `tensors` in place, whatever their placement now, and returns the state.

    Every rank of the default process group must call it: rank 0 reads and broadcasts the catalog
    and the state, and each rank reads the parts of chunks that its shards need from the files.

    The names, global shapes and dtypes, over all ranks, must be those that were saved; `partial`
    allows saved tensors that no rank asks for. Raises UserError, the same on every rank, where
    they differ (no tensor is changed then), or where a file is missing or damaged (some tensors
    may be filled then).
    """
    saved, state = on_rank_zero(lambda: (catalog.read(folder), read_state(folder)))
    on_all_ranks(lambda: check_savable(tensors))
    check_fits(folder, saved, tensors, partial)
    reader = SafetensorsReader(folder, saved)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _no_group_warning_ignored(), torch.no_grad():
            dcp.load(dict(tensors), storage_reader=reader, planner=planner)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise RuntimeError(str(error)) from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the state that was saved in `folder`; raises UserError if it cannot be read."""
    try:
        state = json.loads(catalog.read_text(folder, folders.STATE))
    except json.JSONDecodeError as error:
        raise catalog.damaged_error(folder / folders.STATE, str(error)) from None
    if not isinstance(state, dict):
        raise catalog.damaged_error(folder / folders.STATE, "not a JSON object")
    return state


def _prepare(folder: Path, state: dict[str, Any]) -> str:
    """Serialises `state` and makes the empty partial folder (rank 0)."""
    state_json = json.dumps(state, allow_nan=False)  # first: a bad state leaves the disk untouched
    folders.prepare(folder)
    return state_json


def _commit(folder: Path, state_json: str) -> None:
    """Writes the state and gives the partial folder its final name (rank 0)."""
    folders.write_durably(folders.partial(folder) / folders.STATE, state_json)
    folders.commit(folder)


def _disk_failure(error: OSError | CheckpointException) -> OSError:
    """Returns the first OSError in `error`; raises any other failure, which is a bug."""
    if isinstance(error, OSError):
        return error
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            return failure
    raise RuntimeError(str(error)) from error


def _clean_up_and_explain(folder: Path, failure: OSError, needed_bytes: int) -> str:
    """Removes the partial folder of a failed save and returns the user's message (rank 0)."""
    folders.finish_replacement(folder)
    if folders.partial(folder).exists():
        shutil.rmtree(folders.partial(folder))
    run = next(path for path in folder.absolute().parents if path.exists())
    if failure.errno in _DISK_FULL:
        free_bytes = shutil.disk_usage(run).free
        space = ""
        if needed_bytes:
            space = (
                f" It needs more than {_format_bytes(needed_bytes)}, "
                f"{_format_bytes(free_bytes)} are free there."
            )
        remedy = f"Free space on the disk of {run}, or lower checkpoint.keep"
    else:
        space = ""
        remedy = f"See that {run} can be written to, from every node"
    last = folders.newest(folder.parent)
    intact = f"The last good checkpoint, {last}, is intact." if last else "There is none before it."
    return (
        f"could not save the checkpoint {folder}: {failure.strerror} ({failure.filename})."
        f"{space} {intact} {remedy}, then resume."
    )


def _format_bytes(count: int) -> str:
    """Formats a number of bytes in the largest binary unit that it reaches."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


@contextmanager
def _no_group_warning_ignored() -> Iterator[None]:
    """Ignores torch's warning that there is no process group: one process is a valid layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
