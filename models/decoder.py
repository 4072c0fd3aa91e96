"""The language model: embedding, wiring, head, and heads for further tokens."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from colonnade.kernels.linear import linear
from colonnade.kernels.loss import linear_consistency, linear_objective
from colonnade.models import records
from colonnade.models.blocks.mixture import Mixture
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.mtp import Predictor, shifted
from colonnade.models.names import CanonicalNames
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.reparam import reparametrise
from colonnade.models.report import PassReport
from colonnade.models.seams import same
from colonnade.models.wiring import Stage, State, Wiring


class Embedding(ParameterModule):
    """Token embeddings, `[V, D]`. `leave` is the seam of the same name of the wiring."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(records.embedding(config))
        self.leave: Callable[[Tensor], Tensor] = lambda h: h

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.weight_of("weight")
        if self.sharding.size == 1:
            return F.embedding(tokens, weight)
        rows = tokens - self.sharding.rank * len(weight)
        elsewhere = (rows < 0) | (rows >= len(weight))
        found = F.embedding(rows.masked_fill(elsewhere, 0), weight)
        return self.leave(found.masked_fill(elsewhere[..., None], 0))


class Head(ParameterModule):
    """Vocabulary projection: logits, or the loss without ever holding all of them.

    Tied, it has no weight of its own and is handed the embedding's. `scale` multiplies its input
    (muP's output multiplier). `enter` is the seam of the same name of the wiring, `gather` one that
    puts the logits of all parts of the vocabulary side by side.
    """

    def __init__(self, config: ModelConfig, chunk: int) -> None:
        super().__init__(records.head(config))
        self.chunk, self.cap, self.z = chunk, config.logit_cap, config.logit_z
        self.alpha, self.scale = config.thor_alpha, 1.0
        self.enter: Callable[[Tensor], Tensor] = lambda x: x
        self.gather: Callable[[Tensor], Tensor] = lambda logits: logits

    def forward(
        self, x: Tensor, labels: Tensor | None, tied: Tensor | None, passes: int
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits; with labels the objective, and its parts beside the cross entropy, detached."""
        weight = self.weight_of("weight") if tied is None else tied
        x = self.enter(x if self.scale == 1.0 else x * self.scale)
        if labels is None:
            logits = self.gather(linear(x, weight))
            return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        flat, z = labels.flatten(), self.z if self.training else 0.0
        if passes == 2:
            one, two = (half.flatten(0, 1) for half in x.chunk(2, dim=1))
            objective, mean, consistency = linear_consistency(
                one,
                two,
                weight,
                flat,
                self.chunk,
                self.alpha,
                cap=self.cap,
                z=z,
                sharding=self.sharding,
            )
            second = objective.detach() - mean - consistency  # and z
            return objective, {"consistency": consistency, "second_pass": second}
        rows = x.flatten(0, 1)
        objective, extra = linear_objective(
            rows, weight, flat, self.chunk, cap=self.cap, z=z, sharding=self.sharding
        )
        return objective, {"logit_z": extra} if z else {}


class Decoder(CanonicalNames):
    """A decoder over a pattern of sub-blocks, or a stage of one, written for one device.

    Its weights are drawn from PyTorch's own generator. Made on the meta device it has none, and
    refuses to compute: `parallel.materialise` has `new_decoder`, of the weights that a run of a
    seed begins with, and `load_decoder`, of given ones.

    In training mode, as every module begins, it computes the training function, with gradients or
    without: noise and capacity of routers, and with labels all parts of the objective. In
    evaluation mode (`eval()`) no choice is dropped, and the objective is the negative log
    likelihood alone.

    `mine` is a seam: of a whole sequence `[S, ...]` the part that is worked on here. Where there is
    a cache, as in generation, sequences are not shared.
    """

    def __init__(
        self, config: ModelConfig, loss_chunk: int = 1024, stage: Stage | None = None
    ) -> None:
        """Build the model, or of it the sub-blocks of `stage` and what stands at their ends.

        Raises:
            ValueError: no stage of this model, or stages would share weights.
        """
        super().__init__()
        row = config.symbols
        self.config, self.stage = config, stage or Stage(0, len(row))
        check_stage(config, self.stage)
        self.is_first, self.is_last = self.stage.start == 0, self.stage.stop == len(row)
        self.mine: Callable[[Tensor], Tensor] = same
        distinct = len(config.pattern) if config.share else len(row)
        if self.is_first:
            self.embedding = Embedding(config)
        self.wiring = Wiring(config, row, distinct, stage=self.stage)
        if self.is_last:
            self.head = Head(config, loss_chunk)
        self.mtp = nn.ModuleList(Predictor(config, depth) for depth in range(config.mtp))
        reparametrise(self)
        if not next(self.parameters()).is_meta:  # nobody computes with what memory held
            for module in self.modules():
                if isinstance(module, ParameterModule):
                    module.fill()

    def wirings(self) -> Iterator[Wiring]:
        """All rows of sub-blocks: the model's own, and those of the further tokens' modules."""
        yield self.wiring
        for predictor in self.mtp:
            assert isinstance(predictor, Predictor)
            yield predictor.wiring

    def ends(self) -> list[nn.Module]:
        """Embedding and head, where this stage has them."""
        return [end for name, end in self.named_children() if name in ("embedding", "head")]

    def forward(
        self, tokens: Tensor | State, context: Context, labels: Tensor | None = None
    ) -> Any:
        """Objective and report, or logits.

        Args:
            tokens: `[S, B]` integers; for a stage that is not the first, the `State` that the one
                before it returned.
            context: positions and documents of these tokens, and balance groups.
            labels: `[S, B]` integers, −100 where there is no loss; None for logits. Every stage
                takes them, for they say what is computed.

        Returns:
            without labels the logits `[S, B, V]`. With labels a pair: the objective, summed over
            valid tokens, a scalar in at least fp32, which is the negative log likelihood and what
            `extras` of the report then names; and the `PassReport`. A stage that is not the last
            has its `State` in place of logits or objective. Where ranks share a sequence, all are
            those of this rank's part.

        Raises:
            RuntimeError: the model has no weights.
        """
        if next(self.parameters()).is_meta and not tree_leaves(tokens)[0].is_meta:
            raise RuntimeError(
                "the model has no weights yet: build it by new_decoder(config, seed) or "
                "load_decoder(config, tensors) of colonnade.parallel.materialise"
            )
        if self.training and labels is not None and self.config.has("T"):
            tokens, context = doubled(tokens, context)
        mine = self.mine if context.cache is None else same
        context = context.segment(mine)
        state = tokens if isinstance(tokens, State) else State(self.embedding(mine(tokens)))
        state, report = self.wiring.run(state, context)
        if not self.is_last:
            return state if labels is None else (state, report)
        x = self.wiring.final(state.stream)
        tied = self.embedding.weight_of("weight") if self.config.tied else None
        found = self.head(x, None if labels is None else mine(labels), tied, context.passes)
        if labels is None:
            return found
        objective, extras = found
        report = report._replace(extras=extras)
        if self.training and len(self.mtp):
            assert isinstance(tokens, Tensor)
            further, found = self.further(x, tokens, labels, context)
            objective, report = objective + further, report.joined(found)
        return objective, report

    def further(
        self, x: Tensor, tokens: Tensor, labels: Tensor, context: Context
    ) -> tuple[Tensor, PassReport]:
        """The objective of further tokens, as it is added, and the report of their modules.

        Args:
            x: `[S, B, D]`, the normed end of the stream.
            tokens, labels: of whole sequences.
            context: of this rank's part of them.
        """
        objectives, report = [], PassReport({}, {}, {})
        tied = self.embedding.weight_of("weight") if self.config.tied else None
        for depth, predictor in enumerate(self.mtp, start=1):
            ahead, wanted = shifted(tokens, labels, context.whole_documents, depth)
            x, found = predictor(x, self.embedding(self.mine(ahead)), context)
            objectives.append(self.head(x, self.mine(wanted), tied, context.passes)[0])
            report = report.joined(found)
        first, *others = objectives
        total = sum(others, first) * (self.config.mtp_weight / len(self.mtp))
        return total, report._replace(extras={"mtp": total.detach()})

    def begin_step(self) -> None:
        """An optimizer step begins: what changes once a step may do so at its next use."""
        for module in self.modules():
            if isinstance(module, ParameterModule):
                module.due = module.transformed

    def end_step(self, loads: dict[int, Tensor]) -> None:
        """An optimizer step is done; `loads` are the reports' over the whole global batch."""
        steered: dict[Mixture, Tensor] = {}
        for wiring in self.wirings():
            for t in wiring.places:
                block, index = wiring.block(t), wiring.start + t
                if isinstance(block, Mixture) and self.config.router_bias:
                    steered[block] = steered.get(block, 0) + loads[index].double()
        for block, counts in steered.items():
            block.small.steer(counts, self.config.router_bias_rate)


def doubled(tokens: Tensor | State, context: Context) -> tuple[Tensor | State, Context]:
    """Every sample twice, for two passes with draws of their own; each weighs half in balancing.

    A state, which comes of such samples, stays as it is.
    """

    def twice(t: Tensor) -> Tensor:
        return torch.cat([t, t], dim=-1)

    return tokens if isinstance(tokens, State) else twice(tokens), dataclasses.replace(
        context,
        positions=twice(context.positions),
        documents=None if context.documents is None else twice(context.documents),
        samples=twice(context.sample_numbers()),
        groups=2 * context.groups,
        passes=2,
        tables={},
    )


def check_stage(config: ModelConfig, stage: Stage) -> None:
    """Refuse what is no stage of a model, or would need weights of another one.

    Raises:
        ValueError: with the fields that are at fault.
    """
    count = len(config.symbols)
    if stage == (0, count):
        return
    if not 0 <= stage.start < stage.stop <= count:
        raise ValueError(f"stage {stage.start} to {stage.stop}: the row has {count} sub-blocks")
    shared = [name for name in ("tied", "share", "mtp") if getattr(config, name)]
    if shared:
        fields = ", ".join(f"model.{name} = {getattr(config, name)}" for name in shared)
        raise ValueError(f"{fields}: stages would share weights, which is not built yet")
