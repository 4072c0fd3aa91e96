"""The actions of a pipeline's ranks in order: those of PyTorch's schedules, with their send/recv.

PyTorch orders the passes and places the communication; `parallel.pipeline.run` runs the actions.
PyTorch's own runtime is not used: it allocates the boundaries of all micro-batches at once, splits
backward by walking the graph twice, and reads values of tensors, which fake tensors do not have.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _ComputationType

from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.pipeline.placement import Placement

Kind = Literal[
    "forward", "backward", "input gradient", "weight gradient",
    "send forward", "recv forward", "send backward", "recv backward",
]  # fmt: skip

KINDS: dict[_ComputationType, Kind] = {
    _ComputationType.FORWARD: "forward",
    _ComputationType.FULL_BACKWARD: "backward",
    _ComputationType.BACKWARD_INPUT: "input gradient",
    _ComputationType.BACKWARD_WEIGHT: "weight gradient",
    _ComputationType.SEND_F: "send forward",
    _ComputationType.RECV_F: "recv forward",
    _ComputationType.SEND_B: "send backward",
    _ComputationType.RECV_B: "recv backward",
}
CLASSES = {
    "interleaved": "ScheduleInterleaved1F1B",
    "bfs": "ScheduleLoopedBFS",
    "zb1p": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


class Action(NamedTuple):
    """One action of a rank: a pass of a stage on a micro-batch, or the transfer of its boundary.

    Attributes:
        kind: `backward` computes all gradients, `input gradient` those that the stage before needs
            and `weight gradient` the others; a `recv` is of the stage that will use what arrives.
        stage: the index of the stage.
        micro_batch: the index of the micro-batch.
    """

    kind: Kind
    stage: int
    micro_batch: int


@lru_cache(maxsize=64)
def actions_of(parallel: ParallelConfig, micro_batches: int) -> dict[int, list[Action]]:
    """Returns the actions of every rank of a pipeline for this number of micro-batches, in order.

    Every rank computes those of all, so that the order of transfers between two ranks agrees.
    """
    placement = Placement.of(parallel)
    return with_transfers(compute_actions(parallel, placement, micro_batches), placement)


@lru_cache(maxsize=64)
def forward_actions(
    parallel: ParallelConfig, micro_batches: int, then_backward: bool = False
) -> dict[int, list[Action]]:
    """Returns the actions of every rank for forward passes alone, stage after stage; or for these,
    and then all backward passes from the last stage to the first."""
    placement = Placement.of(parallel)
    forward, backward = _ComputationType.FORWARD, _ComputationType.FULL_BACKWARD
    computations: dict[int, list[Any]] = {}
    for rank in range(parallel.pp):
        stages = placement.stages_of(rank)
        passes = [(stage, forward) for stage in stages]
        passes += [(stage, backward) for stage in reversed(stages)] if then_backward else []
        computations[rank] = [
            _Action(stage, kind, number)
            for stage, kind in passes
            for number in range(micro_batches)
        ]
    return with_transfers(computations, placement)


def with_transfers(
    computations: dict[int, list[Any]], placement: Placement
) -> dict[int, list[Action]]:
    """Returns the actions of every rank with send/recv, in an order in which no rank waits for ever
    even if a send ends only with its recv, as between ranks of NCCL."""
    lowered = _add_send_recv(
        {rank: list(actions) for rank, actions in computations.items()},
        stage_to_rank=lambda stage: placement.ranks[stage],
        num_stages=len(placement.ranks),
    )
    return {
        rank: [
            Action(KINDS[a.computation_type], a.stage_index, a.microbatch_index or 0)
            for action in actions
            for a in action.sub_actions or (action,)
            if a.computation_type in KINDS
        ]
        for rank, actions in lowered.items()
    }


def compute_actions(
    parallel: ParallelConfig, placement: Placement, micro_batches: int
) -> dict[int, list[Any]]:
    """Returns PyTorch's actions of every rank without transfers; None is a pause."""
    pp = parallel.pp
    if parallel.schedule == "gpipe":
        return {rank: gpipe(rank, micro_batches) for rank in range(pp)}
    if parallel.schedule == "1f1b":
        return {rank: one_forward_one_backward(rank, pp, micro_batches) for rank in range(pp)}
    stages = [stub_stage(stage, placement, pp) for stage in placement.stages_of(0)]
    schedule = getattr(torch_schedules, CLASSES[parallel.schedule])(stages, micro_batches)
    order: dict[int, list[Any]] = schedule.pipeline_order
    return order


def stub_stage(index: int, placement: Placement, pp: int) -> Any:
    """Returns what PyTorch's schedules read of a stage when they order its passes."""
    return SimpleNamespace(
        stage_index=index,
        num_stages=len(placement.ranks),
        group_size=pp,
        group_rank=0,
        submod=nn.Identity(),
        has_backward=True,
    )


def gpipe(rank: int, micro_batches: int) -> list[_Action]:
    """All forward passes, then all backward passes (arXiv:1811.06965, figure 2c)."""
    kinds = _ComputationType.FORWARD, _ComputationType.FULL_BACKWARD
    return [_Action(rank, kind, number) for kind in kinds for number in range(micro_batches)]


def one_forward_one_backward(rank: int, pp: int, micro_batches: int) -> list[_Action]:
    """One forward and one backward pass in turn, after pp - rank - 1 forward passes
    (arXiv:2104.04473, figure 4), so that pp - rank micro-batches are in flight."""
    forward, backward = _ComputationType.FORWARD, _ComputationType.FULL_BACKWARD
    ahead = min(pp - rank - 1, micro_batches)
    order = [_Action(rank, forward, number) for number in range(ahead)]
    for number in range(micro_batches):
        if ahead + number < micro_batches:
            order.append(_Action(rank, forward, ahead + number))
        order.append(_Action(rank, backward, number))
    return order
