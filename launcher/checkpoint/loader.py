"""Loads checkpoints, whose files all ranks check first, and chooses the one to resume from."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from colonnade.launcher.checkpoint.catalog import read_catalog
from colonnade.launcher.checkpoint.check import check_fits, check_savable
from colonnade.launcher.checkpoint.folders import (
    STATE,
    TENSORS,
    DamagedError,
    checkpoints,
    damaged_error,
    newest,
)
from colonnade.launcher.checkpoint.manifest import (
    Manifest,
    block_faults,
    blocks,
    raise_first,
    read_manifest,
    size_faults,
)
from colonnade.launcher.checkpoint.read import SafetensorsReader
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero, rank
from colonnade.launcher.errors import UserError


def verify(folder: Path) -> Manifest:
    """Checks sizes and checksums of all files of a checkpoint; returns its manifest.

    Collective: rank 0 reads and broadcasts the manifest, and each rank checks its share of blocks.

    Raises:
        UserError: the same on every rank, for the first file that is missing or differs.
    """
    manifest = on_rank_zero(lambda: checked_sizes(folder))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    share = list(blocks(manifest))[rank() :: ranks]
    on_all_ranks(lambda: raise_first(folder, block_faults(folder, share)))
    return manifest


def checked_sizes(folder: Path) -> Manifest:
    """Returns the manifest of a checkpoint whose files have their sizes, and whose catalog and
    state are what was written; the checksums of its tensors are not compared.

    Raises:
        UserError: a file is missing, or differs.
    """
    manifest = read_manifest(folder)
    raise_first(folder, size_faults(folder, manifest))
    texts = [block for block in blocks(manifest) if block.name in (TENSORS, STATE)]
    raise_first(folder, block_faults(folder, texts, threads=1))
    return manifest


def load(folder: Path, tensors: dict[str, torch.Tensor], partial: bool = False) -> dict[str, Any]:
    """Checks a checkpoint, fills `tensors` in place, whatever their placement now, and returns the
    state.

    Every rank of the default process group must call it: all ranks check its files, rank 0 reads
    and broadcasts the catalog and the state, and each rank reads the parts of chunks that its
    shards need from the files.

    The names, global shapes and dtypes, over all ranks, must be those that were saved; `partial`
    allows saved tensors that no rank asks for.

    Raises:
        UserError: the same on every rank, where they differ or where a file is missing or damaged;
            no tensor is changed then.
    """
    manifest = verify(folder)
    saved, state = on_rank_zero(lambda: (read_catalog(folder), read_state(folder)))
    unlisted = {c.file for e in saved.tensors.values() for c in e.chunks} - set(manifest.files)
    if unlisted:
        raise damaged_error(folder / TENSORS, f"{min(unlisted)} has no checksums")
    on_all_ranks(lambda: check_savable(tensors))
    check_fits(folder, saved, tensors, partial)
    reader = SafetensorsReader(folder, saved)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with without_group_warning(), torch.no_grad():
            dcp.load(dict(tensors), storage_reader=reader, planner=planner)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise RuntimeError(str(error)) from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the state that was saved in `folder`; raises UserError if it is damaged."""
    path = folder / STATE
    manifest = read_manifest(folder)
    raise_first(folder, size_faults(folder, manifest))
    share = [block for block in blocks(manifest) if block.name == STATE]
    raise_first(folder, block_faults(folder, share))
    state = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise damaged_error(path, "not a JSON object")
    return state


class Choice(NamedTuple):
    """The checkpoint to resume from, None if there is none, and why newer ones were passed over."""

    folder: Path | None
    passed: dict[Path, str]


def choose(run: Path, damaged_pass: bool) -> Choice:
    """Chooses the newest checkpoint in `run`, or, if `damaged_pass`, the newest that is whole.

    Collective, as `verify`, where `damaged_pass`.

    Raises:
        UserError: all checkpoints are damaged.
    """
    if not damaged_pass:
        return Choice(on_rank_zero(lambda: newest(run)), {})
    passed: dict[Path, str] = {}
    for folder in reversed(on_rank_zero(lambda: checkpoints(run))):
        try:
            verify(folder)
        except DamagedError as error:
            passed[folder] = str(error).partition(": ")[0]
        else:
            return Choice(folder, passed)
    if passed:
        reasons = "; ".join(passed.values())
        raise UserError(f"{run}: no checkpoint is whole: {reasons}; start a new run")
    return Choice(None, {})


@contextmanager
def without_group_warning() -> Iterator[None]:
    """Ignores torch's warning that there is no process group: one process is a valid layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
