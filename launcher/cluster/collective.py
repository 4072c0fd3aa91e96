"""Actions that all ranks enter together, so that a failure on one is raised on every one."""

import traceback
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from colonnade.launcher.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """This rank, 0 where no process group is initialised."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_all_ranks(action: Callable[[], T], meet: Callable[[], None] | None = None) -> list[T]:
    """Run `action` on every rank and return the results by rank; collective.

    If it fails anywhere, every rank raises the failure of the lowest rank that failed. Where
    `action` may take longer on one rank than the group's time-out, `meet` (of `World`) waits first.
    """
    outcomes = [_attempt(action)]
    if meet is not None:
        meet()
    if dist.is_initialized():
        mine, outcomes = outcomes[0], outcomes * dist.get_world_size()
        dist.all_gather_object(outcomes, mine)
    return [_result(outcome) for outcome in outcomes]


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank, or raise its failure there."""
    outcomes = [_attempt(action) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(outcomes, src=0)
    return _result(cast("tuple[T | None, Exception | None]", outcomes[0]))


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        if isinstance(error, UserError) or type(error).__module__ == "builtins":
            return None, error
        # Other classes may not survive the trip to the other ranks.
        return None, RuntimeError(f"on rank {rank()}:\n{traceback.format_exc()}")


def _result(outcome: tuple[T | None, Exception | None]) -> T:
    value, error = outcome
    if error is not None:
        raise error
    return cast(T, value)
