"""Runs actions that all ranks enter together, and raises a failure of one rank on every rank."""

import traceback
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from colonnade.launcher.errors import UserError

T = TypeVar("T")
ORIGIN = "colonnade_rank"  # attribute of an exception that ranks share: the rank that raised it


def rank() -> int:
    """This rank, 0 where no process group is initialised."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_all_ranks(
    action: Callable[[], T],
    wait_for_all: Callable[[], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[T]:
    """Runs `action` on every rank, and all-gathers the results; returns them by rank.

    If it fails on any rank, every rank raises the failure of the lowest rank that failed. Where
    `action` may take longer on one rank than the group's time-out, pass `World.wait_for_all`: it
    makes the ranks wait for each other before the all-gather. `group` is one of all ranks, for a
    thread that must not use the default group.
    """
    outcome = _attempt(action)
    if wait_for_all is not None:
        wait_for_all()
    if not dist.is_initialized():
        return [_result(outcome)]
    outcomes = [outcome] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group)
    return [_result(outcome) for outcome in outcomes]


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `action` on rank 0, and broadcasts its result; every rank returns it.

    If it fails, every rank raises the failure. `group` as in `on_all_ranks`.
    """
    outcomes = [_attempt(action) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(outcomes, src=0, group=group)
    return _result(cast("tuple[T | None, Exception | None]", outcomes[0]))


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Runs `action`; returns its result, or the exception in a form that can be sent to ranks."""
    try:
        return action(), None
    except Exception as error:
        origin = rank()
        if not isinstance(error, UserError) and type(error).__module__ != "builtins":
            # other ranks may be unable to unpickle an exception of another class
            line = str(error).partition("\n")[0]
            text = f"{type(error).__name__}: {line} (on rank {origin})"
            error = RuntimeError(f"{text}\n{traceback.format_exc()}")
        setattr(error, ORIGIN, origin)
        return None, error


def _result(outcome: tuple[T | None, Exception | None]) -> T:
    """Returns the result of `_attempt`, or raises its exception."""
    value, error = outcome
    if error is not None:
        if isinstance(error, UserError):
            error.agreed = True
        raise error
    return cast(T, value)
