"""Weights of which several ranks of a pipeline have a copy: tied and MTP's embeddings, WideNet.

All copies start equal, get the sum of all copies' gradients, and so stay equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import Stage
from colonnade.parallel.gradients import local, wide_dtype


def holders(config: ModelConfig, stages: Sequence[Sequence[Stage]]) -> dict[str, tuple[int, ...]]:
    """Returns the ranks that have each parameter of which several have a copy, by name.

    Args:
        config: of the model.
        stages: those of each rank of the pipeline.
    """
    if not (config.tied or config.mtp or config.share):
        return {}
    ranks: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(stages):
        with torch.device("meta"):
            model = Decoder(config, stages=of_rank)
        for name, _ in model.named_parameters():
            ranks.setdefault(name, []).append(rank)
    return {name: tuple(found) for name, found in ranks.items() if len(found) > 1}


class SharedGroup(NamedTuple):
    """Parameters that the same ranks have copies of.

    Attributes:
        ranks: their indices along `pp`, ascending.
        parameters: in the same order on all of them.
    """

    ranks: tuple[int, ...]
    parameters: list[nn.Parameter]


class SharedWeights:
    """The copies that this rank has of weights which other ranks of its pipeline have as well."""

    def __init__(
        self,
        model: Decoder,
        held: dict[str, tuple[int, ...]],
        group: dist.ProcessGroup,
        rank: int,
    ) -> None:
        self.group, self.rank = group, rank
        by_ranks: dict[tuple[int, ...], list[nn.Parameter]] = {}
        # By name: a model has them in the order of its stages, which ranks have in another order.
        for name, parameter in sorted(model.named_parameters(), key=lambda named: named[0]):
            if name in held and parameter.requires_grad:
                by_ranks.setdefault(held[name], []).append(parameter)
        # Ranks that are in several groups meet the groups in the same order.
        self.groups = [SharedGroup(ranks, by_ranks[ranks]) for ranks in sorted(by_ranks)]
        copies = (p for g in self.groups if g.ranks[0] != self.rank for p in g.parameters)
        self.copies = set(copies)  # those that a rank with a lower index counts

    def sum_gradients(self) -> None:
        """Sums the gradients of all copies over exactly the ranks that have one.

        Two ranks or a part of the pipeline send/recv them to each other, and each adds them in the
        order of ranks; all ranks of the pipeline all-reduce.
        """
        for group in self.groups:
            self.sum_group(group)

    @torch.no_grad()
    def sum_group(self, group: SharedGroup) -> None:
        """Sums the gradients of parameters that the same ranks have copies of."""
        gradients = [gradient_of(p) for p in group.parameters]
        flat = self.sum_over(group.ranks, torch.cat([g.flatten() for g in gradients]))
        sums = flat.split([g.numel() for g in gradients])
        for gradient, of_all in zip(gradients, sums, strict=True):
            gradient.copy_(of_all.view_as(gradient))

    def sum_over(self, ranks: tuple[int, ...], flat: Tensor) -> Tensor:
        """Returns the sum of the `flat` tensors of these ranks, the same in every bit on all."""
        if len(ranks) == self.group.size():
            dist.all_reduce(flat, group=self.group)
            return flat
        received = {rank: flat if rank == self.rank else torch.empty_like(flat) for rank in ranks}
        transfers = []
        for rank in ranks:
            if rank != self.rank:
                peer = dist.get_global_rank(self.group, rank)
                transfers.append(dist.P2POp(dist.isend, flat, peer, self.group))
                transfers.append(dist.P2POp(dist.irecv, received[rank], peer, self.group))
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        total = received[ranks[0]].clone()
        for rank in ranks[1:]:
            total += received[rank]
        return total


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Returns this rank's shard of a parameter's gradient; zeros where no pass has used it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=wide_dtype(parameter))
    return local(parameter.grad)
