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
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.experts import ExpertBlock, Returned, Routed, Sent
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from colonnade.parallel.seams import Fill, RefusedError, fill_seams, sub_blocks
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
    """Rows in the order `index`, a permutation; backward is a gather as well, by its inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.inverse), None, None


@dataclass(frozen=True)
class Arrivals:
    """The rows that a rank receives.

    Attributes:
        sizes: of them, by the rank that sends them.
        sent_sizes: rows that this rank sends, by the rank that receives them.
        counts: `[experts of this rank]`, rows of each.
        by_expert: `[rows]`, the permutation from the order of arrival to that of experts.
        by_rank: `[rows]`, its inverse.
    """

    sizes: list[int]
    sent_sizes: list[int]
    counts: Tensor
    by_expert: Tensor
    by_rank: Tensor


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

    Attributes:
        group: of the all-to-all.
        etp: ranks of the group that shard an expert.
        shares: of the tokens, over tensor-parallel ranks.
        share: the index of this rank's.
    """

    def __init__(self, group: dist.ProcessGroup, etp: int, shares: int, share: int) -> None:
        self.group, self.etp, self.shares, self.share = group, etp, shares, share

    def dispatch(self, routed: Routed, experts: int) -> Sent:
        """Launches the all-to-all of rows to the ranks of their experts.

        It waits for that of their numbers, which the host needs to allocate what arrives.
        """
        x, keep_mask = self.local_tokens(routed.x), routed.keep_mask
        chosen = self.shards_of(self.local_tokens(routed.chosen), experts)
        if keep_mask is not None:
            keep_mask = self.local_tokens(keep_mask).repeat_interleave(self.etp, dim=1)
        rows, order = kernels.dispatch(x, chosen, experts * self.etp, keep_mask)
        arrivals = self.exchange_counts(order.counts)
        rows = rows.narrow(0, 0, sum(arrivals.sent_sizes))  # without those of dropped choices
        launched = self.exchange(rows, arrivals.sizes, arrivals.sent_sizes)

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
            returned = wait(launched)
            if dropped := len(order.assignments) - len(returned):
                returned = torch.cat([returned, returned.new_zeros(dropped, returned.shape[1])])
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

    def exchange_counts(self, counts: Tensor) -> Arrivals:
        """All-to-all of how many rows each rank sends to each expert; the host waits for it.

        `counts` are this rank's, `[experts · etp]`.
        """
        ranks = self.group.size()
        sent, received = counts.view(ranks, -1), self.received_counts(counts).view(ranks, -1)
        sent_sizes, sizes = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        expert = torch.arange(sent.shape[1], device=counts.device).repeat(ranks)
        expert = expert.repeat_interleave(received.flatten(), output_size=sum(sizes))
        by_expert = expert.argsort(stable=True)
        by_rank = torch.empty_like(by_expert)
        by_rank[by_expert] = torch.arange(len(by_expert), device=counts.device)
        return Arrivals(sizes, sent_sizes, received.sum(0), by_expert, by_rank)

    def received_counts(self, counts: Tensor) -> Tensor:
        """All-to-all of `counts`; returns those of this rank's experts, of rank 0's rows first."""
        ranks = self.group.size()
        if ranks == 1:
            return counts
        sizes = [len(counts) // ranks] * ranks
        launched = c10d.all_to_all_single(counts, sizes, sizes, self.group.group_name)
        return c10d.wait_tensor(launched)

    def exchange(self, rows: Tensor, sizes: list[int], sent_sizes: list[int]) -> Tensor:
        """Launches an all-to-all of rows and, backward, of their gradients.

        Autograd launches that of the gradients as soon as they are ready (`run_backward_first`).
        """
        if self.group.size() == 1:
            return rows
        return run_backward_first(_Exchange.apply(rows, sizes, sent_sizes, self.group))


def expert_parallel(model: Decoder, mesh: DeviceMesh, tp: DeviceMesh) -> None:
    """Shards the experts of a model, built on meta, over the axes `ep` and `etp` of a mesh.

    Args:
        mesh: with the axes `edp`, `ep` and `etp`.
        tp: of one dimension, over whose ranks the rest of a sub-block is sharded.

    Raises:
        RefusedError: a weight of experts outside the module `experts` of its sub-block.
    """
    exchange = TokenExchange(*exchange_group(mesh, tp))
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


def exchange_group(mesh: DeviceMesh, tp: DeviceMesh) -> tuple[dist.ProcessGroup, int, int, int]:
    """The arguments of `TokenExchange`: its group, etp in it, the shares, and this rank's."""
    etp = mesh["etp"].size()
    if etp == tp.size():
        return mesh.get_group("ep"), 1, 1, 0
    group = mesh["ep", "etp"]._flatten("ep_etp").get_group()
    return group, etp, tp.size(), tp.get_local_rank()


def check_experts(path: str, block: SubBlock, experts: object) -> None:
    """Refuses weights that are sharded by experts where nothing would shard them.

    Raises:
        RefusedError: such a weight, by name.
    """
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
