"""One micro-batch through the stages of a pipeline's rank without other ranks, for dry runs."""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.gradients import local
from colonnade.parallel.parallelize import keep_weights
from colonnade.parallel.passes import DeviceInputs
from colonnade.parallel.pipeline.pipeline import Pipeline
from colonnade.parallel.pipeline.run import Boundary, Run, Transfer
from colonnade.parallel.pipeline.schedule import actions_of, forward_actions

T = TypeVar("T")


class CountedRun(Run):
    """Sends nothing, and counts the bytes of what it would send to other stages' ranks."""

    def __init__(self, pipeline: Pipeline, inputs: DeviceInputs, scale: float) -> None:
        super().__init__(pipeline, [inputs], scale, training=True)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def transfer(self, operation: Callable[..., Any], tensors: Boundary, stage: int) -> Transfer:
        """Counts the tensors that would be sent to the rank of another stage."""
        if operation is dist.isend:
            self.calls["send"] += len(tensors)
            self.bytes["send"] += sum(t.nbytes for t in tensors)
        return Transfer(tensors, [])


def run_passes(run: CountedRun, mark: Callable[[], T]) -> dict[int, T]:
    """Runs every stage of the rank forward, and then backward; returns the marks at the ends of
    forward passes by stage."""
    pipeline, marks = run.pipeline, {}
    pipeline.gather_ends()
    keep_weights(pipeline.model)
    for action in forward_actions(pipeline.parallel, 1, then_backward=True)[pipeline.rank]:
        run.perform(action)
        if action.kind == "forward":
            marks[action.stage] = mark()
    return marks


def sum_over_all_ranks(pipeline: Pipeline) -> None:
    """All-reduces the gradients of weights of which all ranks of the pipeline have a copy."""
    for group in pipeline.shared.groups:
        if len(group.ranks) == pipeline.pipeline_group.size():
            pipeline.shared.sum_group(group)


def sent_for_shared_weights(pipeline: Pipeline) -> tuple[int, int]:
    """Returns the calls and bytes of the send/recv that sums the gradients of weights which other
    ranks of the pipeline have as well, where these are not all of its ranks."""
    calls = total = 0
    for ranks, parameters in pipeline.shared.groups:
        if len(ranks) < pipeline.pipeline_group.size():
            calls += len(ranks) - 1
            total += (len(ranks) - 1) * sum(local(p).nbytes for p in parameters)
    return calls, total


def in_flight(
    parallel: ParallelConfig, rank: int, micro_batches: int, held: dict[int, int]
) -> tuple[int, int]:
    """Returns the most bytes that forward passes keep at once in a step, and how many passes then
    wait for their backward.

    Args:
        parallel: the layout.
        rank: along `pp`.
        micro_batches: of a step.
        held: bytes that the forward pass of each of the rank's stages keeps.
    """
    if parallel.pp == 1:
        return sum(held.values()), 1
    most = running = passes = at_most = 0
    for action in actions_of(parallel, micro_batches)[rank]:
        if action.kind == "forward":
            running, passes = running + held[action.stage], passes + 1
            if running > most:
                most, at_most = running, passes
        elif action.kind in ("backward", "weight gradient"):
            running, passes = running - held[action.stage], passes - 1
    return most, at_most
