"""Expert parallelism: shards experts over the axes `ep` and `etp`, and sends tokens to them.

Each rank of the `ep` axis holds some of the experts, and the ranks of the `etp` axis shard each of
these. A rank sorts its tokens by the rank of their expert; an all-to-all brings them there, where
they are sorted by expert, and after the experts' MLPs an all-to-all brings the outputs back. With 2
ranks, 4 experts and one choice per token, a row being (token's rank, expert):

    rank                       0                            1
    dispatch, by expert        00 01 01 02 03               10 12 12 13
    all-to-all >               00 01 01 10                  02 03 12 12 13
    by expert                  00 10 01 01                  02 12 12 03 13
    experts, back in order     00 01 01 10                  02 03 12 12 13
    all-to-all >               00 01 01 02 03               10 12 12 13
    combine                    each token's rows, weighted and summed in the order of its choices

Rows move by gathers only, forward and backward, so results do not depend on timing.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from colonnade.kernels import experts as kernels
from colonnade.kernels.experts import DispatchOrder
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.experts import ExpertBlock, Returned, Routed, Sent
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from colonnade.parallel.seams import Fill, RefusedError, fill_seams, seams_of_halves, sub_blocks
from colonnade.parallel.tensor import local_shard, run_backward_first, sharding_over, wait

c10d = torch.ops._c10d_functional


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows, launched and not waited for; so is that of their gradients.

    That of `spmd_types` sends lists of tensors, which gloo refuses where their sizes differ.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sizes: list[int], sent_sizes: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.arguments = sent_sizes, sizes, group
        return launch_all_to_all(rows, sizes, sent_sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return launch_all_to_all(grad, *ctx.arguments), None, None, None


def launch_all_to_all(
    rows: Tensor, sizes: list[int], sent_sizes: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Launches an all-to-all: `sent_sizes[r]` rows go to rank r, `sizes[r]` rows come from it."""
    sent = c10d.all_to_all_single(rows.contiguous(), sizes, sent_sizes, group.group_name)
    return AsyncCollectiveTensor(sent)


class _Reorder(torch.autograd.Function):
    """Rows in the order `index`; backward is a gather as well, by its inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.inverse), None, None


@dataclass(frozen=True)
class Slots:
    """Where rows are when each expert has the same number of slots: that is known to the host, so
    nothing waits for it.

    Attributes:
        row: `[slots of all experts]`, the row in each slot; in empty slots any row.
        slot: `[rows]`, the slot of each row; of dropped choices any slot.
    """

    row: Tensor
    slot: Tensor


@dataclass(frozen=True)
class Arrivals:
    """The rows that a rank receives.

    Attributes:
        sizes: of them, by the rank that sends them.
        sent_sizes: rows that this rank sends, by the rank that receives them.
        counts: `[experts of this rank]`, rows of each.
        by_expert: `[rows]`, the permutation from the order of arrival to that of experts; empty
            slots come last, as rows without an expert.
        by_rank: `[rows]`, its inverse.
        slots: where the sent rows are; None: one after the other, without dropped choices.
    """

    sizes: list[int]
    sent_sizes: list[int]
    counts: Tensor
    by_expert: Tensor
    by_rank: Tensor
    slots: Slots | None = None

    def to_send(self, rows: Tensor) -> Tensor:
        """The rows that the rank sends, of its rows sorted by expert."""
        if self.slots is None:
            return rows.narrow(0, 0, sum(self.sent_sizes))
        return _Reorder.apply(rows, self.slots.row, self.slots.slot)

    def sorted_by_expert(self, returned: Tensor, count: int) -> Tensor:
        """The opposite: `count` rows, of which those of dropped choices are undefined."""
        if self.slots is not None:
            return _Reorder.apply(returned, self.slots.slot, self.slots.row)
        if count == len(returned):
            return returned
        dropped = returned.new_zeros(count - len(returned), returned.shape[1])
        return torch.cat([returned, dropped])


@dataclass(frozen=True)
class SentOverRanks(Sent):
    """Rows on their way over an all-to-all; `arrivals` says how they return."""

    arrivals: Arrivals


class TokenExchange:
    """The seams `dispatch` and `combine` over the ranks of the `ep` and `etp` axes.

    Every row goes to all ranks that shard its expert, and what these compute, partial sums of its
    output, is summed by `combine`. Where as many ranks shard an expert as the rest of a sub-block
    (etp = tp), tensor-parallel ranks hold the same tokens, and each sends them to its own shard of
    the expert: the all-to-all is over `ep` alone, and the output is a partial sum over `tp`. Where
    not, each tensor-parallel rank sends an equal share of the tokens, and its output is zero for
    all others, which is a partial sum over `tp` as well.

    How many rows arrive is known only after an all-to-all of their numbers, for which the host
    waits, because it allocates them (once more in recomputation, though the numbers are not sent
    again). On a GPU it does not where a capacity bounds the rows of an expert: as many slots as the
    bound are then sent, and some of them are empty. (`expert_mlp` waits unless it is in bf16.)

    Attributes:
        group: of the all-to-all.
        etp: ranks of the group that shard an expert.
        shares: of the tokens, over tensor-parallel ranks.
        share: the index of this rank's.
        uses_slots: whether rows are sent in slots where their number is bounded.
    """

    def __init__(
        self, group: dist.ProcessGroup, etp: int, shares: int, share: int, uses_slots: bool = False
    ) -> None:
        self.group, self.etp, self.shares, self.share = group, etp, shares, share
        self.uses_slots = uses_slots

    def dispatch(self, routed: Routed, experts: int) -> Sent:
        """Launches the all-to-all of rows to the ranks of their experts."""
        x, keep_mask = self.local_tokens(routed.x), routed.keep_mask
        chosen = self.shards_of(self.local_tokens(routed.chosen), experts)
        if keep_mask is not None:
            keep_mask = self.local_tokens(keep_mask).repeat_interleave(self.etp, dim=1)
        rows, order = kernels.dispatch(x, chosen, experts * self.etp, keep_mask)
        arrivals = self.arrivals(order, self.slots(routed, len(order.counts)))
        launched = self.exchange(arrivals.to_send(rows), arrivals.sizes, arrivals.sent_sizes)

        def receive() -> tuple[Tensor, Tensor]:
            by_expert = _Reorder.apply(launched, arrivals.by_expert, arrivals.by_rank)
            return by_expert, arrivals.counts

        return SentOverRanks(receive, order, arrivals)

    def combine(self, rows: Tensor, sent: Sent, weight: Tensor) -> Returned:
        """Launches the all-to-all of the experts' outputs to the ranks of their tokens."""
        assert isinstance(sent, SentOverRanks)
        arrivals, order = sent.arrivals, sent.order
        rows = _Reorder.apply(rows, arrivals.by_rank, arrivals.by_expert)
        launched = self.exchange(rows, arrivals.sent_sizes, arrivals.sizes)

        def receive(launched: Tensor) -> Tensor:
            returned = arrivals.sorted_by_expert(wait(launched), len(order.assignments))
            shares = self.local_tokens(weight).repeat_interleave(self.etp, dim=1)
            y = kernels.combine(returned, order, shares)
            return self.all_tokens(y, *weight.shape[:2])

        return Returned(launched, receive)

    def local_tokens(self, t: Tensor) -> Tensor:
        """Slices this rank's share of the tokens: `[S, B, ...]` to `[T, ...]`."""
        return t.flatten(0, 1).tensor_split(self.shares)[self.share]

    def all_tokens(self, y: Tensor, S: int, B: int) -> Tensor:
        """The opposite, `[T, D]` to `[S, B, D]`, with zeros for the tokens of other ranks."""
        if self.shares > 1:
            sizes = [len(share) for share in torch.empty(S * B, 0).tensor_split(self.shares)]
            before, after = sum(sizes[: self.share]), sum(sizes[self.share + 1 :])
            y = F.pad(y, (0, 0, before, after))
        return y.view(S, B, -1)

    def shards_of(self, chosen: Tensor, experts: int) -> Tensor:
        """Numbers the shards of the chosen experts by rank: `[T, k]` to `[T, k · etp]`.

        All shards of a rank's experts have consecutive numbers, as the experts themselves have.
        """
        if self.etp == 1:
            return chosen
        per_rank = experts * self.etp // self.group.size()
        rank, index = (t[..., None] for t in (chosen // per_rank, chosen % per_rank))
        ranks = rank * self.etp + torch.arange(self.etp, device=chosen.device)
        return (ranks * per_rank + index).flatten(1)

    def slots(self, routed: Routed, shards: int) -> int | None:
        """The slots of each shard of an expert, alike on all ranks; None: rows are not sent so."""
        S, B, k = routed.chosen.shape
        if not self.uses_slots or routed.bound is None or self.shares > S * B:
            return None
        tokens = -(-S * B // self.shares)  # the largest share
        slots = min(routed.bound, tokens)
        # With more slots than twice the rows, sending them costs more than waiting for the host.
        return slots if slots * shards <= 2 * tokens * k * self.etp else None

    def arrivals(self, order: DispatchOrder, slots: int | None) -> Arrivals:
        """All-to-alls the numbers of rows; says which rows arrive, and in which order."""
        received = self.received_counts(order.counts)
        if slots is None:
            return arrivals_by_count(order, received)
        return arrivals_in_slots(order, received, slots)

    def received_counts(self, counts: Tensor) -> Tensor:
        """All-to-all of how many rows each rank sends to each expert: `[experts · etp]`, this
        rank's, to `[ranks, experts of this rank]`."""
        ranks = self.group.size()
        if ranks == 1:
            return counts.view(1, -1)
        per_rank = [len(counts) // ranks] * ranks
        launched = c10d.all_to_all_single(counts, per_rank, per_rank, self.group.group_name)
        return c10d.wait_tensor(launched).view(ranks, -1)

    def exchange(self, rows: Tensor, sizes: list[int], sent_sizes: list[int]) -> Tensor:
        """Launches an all-to-all of rows and, backward, of their gradients.

        Autograd launches that of the gradients as soon as they are ready (`run_backward_first`).
        """
        if self.group.size() == 1:
            return rows
        return run_backward_first(_Exchange.apply(rows, sizes, sent_sizes, self.group))


def arrivals_by_count(order: DispatchOrder, received: Tensor) -> Arrivals:
    """The arrivals of just the rows that are sent; the host waits for their numbers."""
    ranks, experts = received.shape
    sent = order.counts.view(ranks, experts).sum(1)
    numbers = torch.stack([sent, received.sum(1)])
    sent_sizes, sizes = kernels.counts_on_host(numbers, len(order.assignments))
    expert = torch.arange(experts, device=received.device).repeat(ranks)
    expert = expert.repeat_interleave(received.flatten(), output_size=sum(sizes))
    return Arrivals(sizes, sent_sizes, received.sum(0), *sort_order(expert))


def arrivals_in_slots(order: DispatchOrder, received: Tensor, slots: int) -> Arrivals:
    """The arrivals of `slots` rows of every expert from every rank; nothing waits."""
    ranks, experts = received.shape
    sizes = [experts * slots] * ranks
    slot = torch.arange(slots, device=received.device)
    expert = torch.arange(experts, device=received.device)[None, :, None]
    expert = torch.where(slot < received[..., None], expert, experts).flatten()
    # Where rows are sent: row c of an expert is in slot c of its slots.
    rows, last = len(order.assignments), len(order.counts) - 1
    ends = order.counts.cumsum(0)
    starts = ends - order.counts
    row = (starts[:, None] + slot).clamp(max=rows - 1).flatten()
    number = torch.arange(rows, device=received.device)
    of_row = torch.searchsorted(ends, number, right=True).clamp(max=last)
    slot_of_row = of_row * slots + (number - starts[of_row]).clamp(max=slots - 1)
    places = Slots(row, slot_of_row)
    return Arrivals(sizes, sizes, received.sum(0), *sort_order(expert), places)


def sort_order(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The permutation that sorts keys, in their order where they are equal; and its inverse."""
    order = keys.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


def expert_parallel(model: Decoder, mesh: DeviceMesh, tp: DeviceMesh) -> None:
    """Shards the experts of a model, built on meta, over the axes `ep` and `etp` of a mesh.

    Args:
        mesh: with the axes `edp`, `ep` and `etp`.
        tp: of one dimension, over whose ranks the rest of a sub-block is sharded.

    Raises:
        RefusedError: a weight of experts outside the module `experts` of its sub-block.
    """
    exchange = TokenExchange(*exchange_group(mesh, tp), sends_slots(mesh.device_type))
    for path, block in sub_blocks(model):
        experts = block.experts if isinstance(block, ExpertBlock) else None
        check_experts(path, block, experts)
        if experts is not None:
            distribute_experts(experts, mesh)
            block.exchanges = exchange.group.size() > 1
    fills: dict[str, Fill] = {
        "dispatch": lambda seam: exchange.dispatch,
        "combine": lambda seam: exchange.combine,
    }
    fill_seams(model, "ep", fills)


def sends_slots(device: str) -> bool:
    """Whether rows are sent in slots on this type of device, where a capacity bounds them."""
    return device == "cuda"


def exchange_group(mesh: DeviceMesh, tp: DeviceMesh) -> tuple[dist.ProcessGroup, int, int, int]:
    """The arguments of `TokenExchange`: its group, etp in it, the shares, and this rank's."""
    etp = mesh["etp"].size()
    if etp == tp.size():
        return mesh.get_group("ep"), 1, 1, 0
    group = mesh["ep", "etp"]._flatten("ep_etp").get_group()
    return group, etp, tp.size(), tp.get_local_rank()


def check_experts(path: str, block: SubBlock, experts: object) -> None:
    """Refuses weights that are sharded by experts where nothing would shard them, and experts to
    which nothing would send tokens.

    Raises:
        RefusedError: such a weight, or such a sub-block, by name.
    """
    if experts is not None and not {"dispatch", "combine"} <= seams_of_halves(block):
        raise RefusedError(
            f"{path}: {type(block).__name__} has experts and no seams where ranks could send them "
            "tokens; declare dispatch on its first half and combine on its second"
        )
    for name, module in block.named_modules(prefix=path):
        for weight, spec in module.specs.items() if isinstance(module, ParameterModule) else ():
            if spec.ep is not None and module is not experts:
                raise RefusedError(
                    f"{name}.{weight}: is sharded over expert-parallel ranks, and is not in "
                    f"{path}.experts, which alone they shard; declare it with half='experts'"
                )


def distribute_experts(module: ParameterModule, mesh: DeviceMesh) -> None:
    """Makes parameters and buffers of experts DTensors over `ep` and `etp`, and the module compute
    with its local shards.

    Gradients of those that etp ranks do not shard are partial sums over them.
    """
    axes = tuple(axis for axis in ("ep", "etp") if mesh[axis].size() > 1)
    if not axes:
        return
    if "etp" in axes:
        module.sharding = sharding_over(mesh.get_group("etp"))
    module.local = module.local_state = local_shard
    for name, spec in module.specs.items():
        splits = [getattr(spec, axis) for axis in axes]
        placements = [Replicate() if split is None else Shard(split.dim) for split in splits]
        full = getattr(module, name).data
        # No rank broadcasts: the model is on meta, and `materialise` fills every shard.
        sharded = distribute_tensor(full, mesh[axes], placements, src_data_rank=None)
        setattr(module, name, sharded if spec.state else nn.Parameter(sharded))
        if "etp" in axes and spec.etp is None and not spec.state:
            spec.partial = "etp"
