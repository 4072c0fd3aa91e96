"""Runs the stages of a pipeline that one rank has: passes in the order of a schedule, send/recv."""

from collections.abc import Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import Stage, skips_newest
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.parallelize import (
    COMPUTE,
    Settings,
    keep_weights,
    reduce_gradients,
    reshard,
    storage_dtype,
)
from colonnade.parallel.passes import DeviceInputs, Inputs, Outcome, Passes, RunningSums, evaluating
from colonnade.parallel.pipeline.placement import Placement
from colonnade.parallel.pipeline.run import Boundary, Run, Shape
from colonnade.parallel.pipeline.schedule import actions_of, forward_actions
from colonnade.parallel.pipeline.shared import SharedWeights, holders
from colonnade.parallel.pipeline.timeline import Observer, observe_action


class Pipeline(Passes):
    """The passes of a pipeline. Each of its ranks reads the integers of every micro-batch itself;
    activations and their gradients alone are sent.

    FSDP2 all-gathers every weight once a step, when its first pass needs it, and keeps it;
    gradients of all micro-batches are summed unsharded, and reduce-scattered once, at the end.

    Attributes:
        stages: all of the pipeline, in order.
        placement: their ranks.
        rank: of this process along `pp`.
        local: the indices of its stages.
        observer: of the actions of `train`; None: nobody.
    """

    def __init__(
        self, model: Decoder, stages: Sequence[Stage], mesh: DeviceMesh, recipe: Settings,
        device: torch.device, rank: int | None = None,
    ) -> None:  # fmt: skip
        """`rank` is for a dry run, in which one process plays all ranks of the pipeline."""
        super().__init__(model, device)
        self.parallel: ParallelConfig = recipe.parallel
        self.stages, self.placement = stages, Placement.of(self.parallel)
        self.pipeline_group = mesh.get_group("pp")
        self.rank = self.pipeline_group.rank() if rank is None else rank
        self.local = self.placement.stages_of(self.rank)
        self.dtype = COMPUTE[recipe.train.precision]
        self.storage_dtype = storage_dtype(recipe.train.precision)
        of_ranks = [self.stages_of(rank) for rank in range(self.pipeline_group.size())]
        held = holders(model.config, of_ranks)
        self.shared = SharedWeights(model, held, self.pipeline_group, self.rank)
        self.names: dict[str, dict[object, Tensor]] = {}
        if rank is None:  # NCCL wants all ranks of a group in its first operation
            dist.all_reduce(torch.zeros(1, device=device), group=self.pipeline_group)
        self.observer: Observer | None = None

    def stages_of(self, rank: int) -> list[Stage]:
        """Returns the stages of a rank."""
        return [self.stages[index] for index in self.placement.stages_of(rank)]

    def train(self, inputs: Sequence[Inputs], scale: float) -> list[Outcome]:
        """Runs the passes of a step in the order of the schedule. Collective."""
        self.gather_ends()
        keep_weights(self.model)
        run = Run(self, inputs, scale, training=True)
        for action in actions_of(self.parallel, len(inputs))[self.rank]:
            with observe_action(self.observer, *action):
                run.perform(action)
        run.wait_for_sends()
        if isinstance(self.model, FSDPModule):  # else gradients are complete already
            self.expect_gradients()
        reduce_gradients(self.model)
        return run.outcomes

    def repeat(self, inputs: Inputs, scale: float) -> None:
        """Runs one micro-batch forward through all stages, and backward, whatever the schedule.
        Collective."""
        self.gather_ends()
        keep_weights(self.model)
        run = Run(self, [inputs], scale, training=True)
        for action in forward_actions(self.parallel, 1, then_backward=True)[self.rank]:
            run.perform(action)
        run.wait_for_sends()
        reduce_gradients(self.model)

    def evaluate(self, inputs: Sequence[Inputs]) -> list[Outcome]:
        """Runs forward passes in evaluation mode, stage by stage. Collective."""
        with evaluating(self.model):
            self.gather_ends()
            run = Run(self, inputs, 1.0, training=False)
            for action in forward_actions(self.parallel, len(inputs))[self.rank]:
                run.perform(action)
            run.wait_for_sends()
        reshard(self.model)
        return run.outcomes

    def logits(self, tokens: Tensor, context: Context, last: int | None = None) -> Tensor:
        """As in `Passes`; the last stage's rank broadcasts the logits. Collective."""
        self.gather_ends()
        run = Run(self, [DeviceInputs(tokens, context, last=last)], 1.0, training=False)
        for action in forward_actions(self.parallel, 1)[self.rank]:
            run.perform(action)
        run.wait_for_sends()
        count = len(tokens) if last is None else min(last, len(tokens))
        shape = count, tokens.shape[1], self.model.config.vocab
        logits = torch.empty(shape, dtype=self.storage_dtype, device=self.device)
        final = len(self.stages) - 1
        if final in self.local:
            (of_all,) = run.outputs[final, 0]
            logits.copy_(of_all)
        source = dist.get_global_rank(self.pipeline_group, self.placement.ranks[-1])
        dist.broadcast(logits, source, group=self.pipeline_group)
        return logits

    def unite(self, kind: str, sums: RunningSums) -> None:
        """Adds zeros under the names that only other stages have. The first time for sums of a kind
        all-gathers the names of all stages. Collective."""
        if kind not in self.names:
            named = {name: torch.zeros_like(value, device="cpu") for name, value in sums.items()}
            gathered: list[dict[object, Tensor]] = [{}] * self.pipeline_group.size()
            dist.all_gather_object(gathered, named, group=self.pipeline_group)
            self.names[kind] = {n: zero for of_rank in gathered for n, zero in of_rank.items()}
        for name, zero in self.names[kind].items():
            if name not in sums:
                sums[name] = zero.to(self.device)

    def complete_gradients(self) -> None:
        """Sums the gradients of shared weights over the ranks that have them. Collective."""
        self.shared.sum_gradients()

    @property
    def copies(self) -> Set[nn.Parameter]:
        """This rank's parameters that a rank with a lower index counts."""
        return self.shared.copies

    @property
    def shared_parameters(self) -> Set[nn.Parameter]:
        """This rank's parameters of which other ranks have copies."""
        return {p for group in self.shared.groups for p in group.parameters}

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of the pipeline."""
        return self.pipeline_group

    def gather_ends(self) -> None:
        """All-gathers embedding and head: a head that is tied uses the embedding's weight, which no
        call of a module on its rank would gather."""
        for end in self.model.ends():
            if isinstance(end, FSDPModule):
                end.unshard()

    def boundary(self, stage: int, shape: Shape) -> Boundary:
        """Returns empty tensors for the input of a stage: the stream `[S, B, D]`, and where its
        first sub-block skips the newest output also that output."""
        config, parallel = self.model.config, self.parallel
        length = shape.length if shape.cached else shape.length // parallel.cp
        rows = shape.rows
        if self.model.training:
            length //= parallel.tp if parallel.sequence else 1
            rows *= 2 if config.has("T") else 1  # THOR's two passes
        skips = skips_newest(config, config.symbols)[self.stages[stage].start]
        size = length, rows, config.hidden
        return tuple(
            torch.empty(size, dtype=self.dtype, device=self.device) for _ in range(1 + skips)
        )
