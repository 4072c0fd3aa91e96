"""The language model: embedding, wiring, head, and modules for multi-token prediction."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colonnade.kernels.linear import linear
from colonnade.kernels.loss import linear_consistency, linear_objective
from colonnade.models import records
from colonnade.models.blocks.mixture import Mixture
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.mtp import Predictor, shift
from colonnade.models.names import CanonicalNames
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.reparam import reparametrise
from colonnade.models.report import PassReport
from colonnade.models.seams import identity
from colonnade.models.wiring import Stage, State, Wiring


class Embedding(ParameterModule):
    """Token embeddings, `[V, D]`, and where configured learned positions, `[N, D]`.

    Where ranks shard the vocabulary, each looks up the tokens of its shard and has zeros for the
    others; the seam `leave`, that of the wiring, all-reduces or reduce-scatters the sum.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(records.embedding(config))
        self.multiplier = config.embedding_multiplier
        self.leave: Callable[[Tensor], Tensor] = lambda h: h

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        weight = self.weight_of("weight")
        if self.sharding.size == 1:
            return self.placed(self.multiplied(F.embedding(tokens, weight)), positions)
        rows = tokens - self.sharding.rank * len(weight)
        on_other_rank = (rows < 0) | (rows >= len(weight))
        embedded = F.embedding(rows.masked_fill(on_other_rank, 0), weight)
        embedded = self.multiplied(embedded.masked_fill(on_other_rank[..., None], 0))
        return self.leave(self.placed(embedded, positions))

    def placed(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """Adds the learned positions, as a term of a partial sum that counts on one rank."""
        if "positions" not in self.specs:
            return embedded
        table = self.weight_of("positions")
        return embedded + self.sharding.once(F.embedding(positions, table))

    def multiplied(self, embedded: Tensor) -> Tensor:
        """Returns the embeddings times the configured factor."""
        return embedded if self.multiplier == 1.0 else embedded * self.multiplier


class Head(ParameterModule):
    """Vocabulary projection: computes logits, or the loss without ever holding all logits.

    Under model.tied it has no weight and is passed the embedding's. `scale` multiplies its input
    (the configured factor of logits, times muP's). `enter` is the wiring's seam; `gather` is a seam
    that all-gathers the logits of all shards of the vocabulary.
    """

    def __init__(self, config: ModelConfig, chunk: int) -> None:
        super().__init__(records.head(config))
        self.chunk, self.cap, self.z = chunk, config.logit_cap, config.logit_z
        self.alpha, self.scale = config.thor_alpha, config.logit_multiplier
        self.enter: Callable[[Tensor], Tensor] = lambda x: x
        self.gather: Callable[[Tensor], Tensor] = lambda logits: logits

    def forward(
        self, x: Tensor, labels: Tensor | None, tied: Tensor | None, passes: int
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Returns logits, or with labels the objective and its additional terms.

        The terms are those beside the cross entropy (its mean over THOR's two passes), detached and
        summed over tokens.
        """
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
            second_pass = objective.detach() - mean - consistency  # includes the z-loss
            return objective, {"consistency": consistency, "second_pass": second_pass}
        rows = x.flatten(0, 1)
        objective, extra = linear_objective(
            rows, weight, flat, self.chunk, cap=self.cap, z=z, sharding=self.sharding
        )
        return objective, {"logit_z": extra} if z else {}


class Decoder(CanonicalNames):
    """A decoder over a pattern of sub-blocks, or the pipeline stages of it that one rank has,
    written for one device.

    Its weights are drawn from PyTorch's default generator. Built on the meta device it has none and
    refuses to compute: `new_decoder` of `parallel.materialise` builds one with the initial weights
    of a run with a given seed, `load_decoder` one with given weights.

    In training mode, the initial mode of every module, it computes the training function, with
    gradients or without: noise and capacity of routers, and with labels all terms of the objective.
    In evaluation mode (`eval()`) no choice of an expert is dropped, and the objective is the
    negative log likelihood alone.

    `local_segments` is a seam that slices this rank's segments from a full sequence `[S, ...]`.
    With a cache, as in generation, it is not called: every rank has the full sequence.
    """

    def __init__(
        self, config: ModelConfig, loss_chunk: int = 1024, stages: Sequence[Stage] | None = None
    ) -> None:
        """Builds the model, or some of its stages.

        The first stage has the embedding; the last one has the head, the modules for multi-token
        prediction, and a copy of the embedding where those or the head need it. Under model.share
        every stage has a copy of each sub-block that it runs.

        Raises:
            ValueError: `stages` are no stages of this model.
        """
        super().__init__()
        row = config.symbols
        whole = Stage(0, len(row))
        self.config, self.stages = config, tuple(stages or [whole])
        for stage in self.stages:
            if not (stage == whole or 0 <= stage.start < stage.stop <= len(row)):
                raise ValueError(
                    f"stage {stage.start} to {stage.stop}: the row has {len(row)} sub-blocks"
                )
        self.has_head = any(map(self.is_last, self.stages))
        self.has_embedding = any(map(self.is_first, self.stages)) or (
            self.has_head and (config.tied or config.mtp > 0)
        )
        self.local_segments: Callable[[Tensor], Tensor] = identity
        distinct = len(config.pattern) if config.share else len(row)
        if self.has_embedding:
            self.embedding = Embedding(config)
        self.wiring = Wiring(config, row, distinct, stages=self.stages)
        if self.has_head:
            self.head = Head(config, loss_chunk)
        predictors = config.mtp if self.has_head else 0
        self.mtp = nn.ModuleList(Predictor(config, depth) for depth in range(predictors))
        reparametrise(self)
        if not next(self.parameters()).is_meta:  # otherwise the weights are uninitialised memory
            for module in self.modules():
                if isinstance(module, ParameterModule):
                    module.fill()

    def is_first(self, stage: Stage) -> bool:
        """Whether the stage begins with the embedding."""
        return stage.start == 0

    def is_last(self, stage: Stage) -> bool:
        """Whether the stage ends with the head."""
        return stage.stop == len(self.config.symbols)

    def wirings(self) -> Iterator[Wiring]:
        """Yields the wiring of the model and those of its modules for multi-token prediction."""
        yield self.wiring
        for predictor in self.mtp:
            assert isinstance(predictor, Predictor)
            yield predictor.wiring

    def ends(self) -> list[nn.Module]:
        """Returns embedding and head, if this stage has them."""
        return [end for name, end in self.named_children() if name in ("embedding", "head")]

    def forward(
        self,
        tokens: Tensor,
        context: Context,
        labels: Tensor | None = None,
        last: int | None = None,
        state: State | None = None,
        stage: Stage | None = None,
    ) -> Any:
        """Computes objective and report, or logits; or runs one stage.

        Args:
            tokens: `[S, B]` integers.
            context: positions and documents of these tokens, and balance groups.
            labels: `[S, B]` integers, −100 where there is no loss; None for logits. Every stage
                takes them, because they decide what is computed.
            last: without labels, of how many last tokens the logits are computed; None: of all.
            state: what the stage before returned; None for the first stage.
            stage: which of its `stages` to run; None: the only one.

        Returns:
            without labels the logits `[S, B, V]`, or those of the `last` tokens. With labels a
            pair: the objective, summed over valid tokens, a scalar in at least fp32, which is the
            negative log likelihood plus the terms in `extras` of the report; and the `PassReport`.
            A stage that is not the last returns its `State` in place of logits or objective. Under
            context parallelism all are those of this rank's segments, not reduced over the context
            group.

        Raises:
            RuntimeError: the model has no weights.
            ValueError: it has several stages, and none is named.
        """
        if next(self.parameters()).is_meta and not tokens.is_meta:
            raise RuntimeError(
                "the model has no weights yet: build it by new_decoder(config, seed) or "
                "load_decoder(config, tensors) of colonnade.parallel.materialise"
            )
        if stage is None:
            (stage,) = self.stages
        if self.training and labels is not None and self.config.has("T"):
            tokens, context = duplicate_samples(tokens, context)
        local_segments = self.local_segments if context.cache is None else identity
        context = context.segment(local_segments)
        if state is None:
            state = State(self.embedding(local_segments(tokens), context.positions))
        state, report = self.wiring.run(state, context, stage)
        if not self.is_last(stage):
            return state if labels is None else (state, report)
        stream = state.stream if last is None or labels is not None else state.stream[-last:]
        x = self.wiring.final(stream)
        tied = self.embedding.weight_of("weight") if self.config.tied else None
        if labels is None:
            return self.head(x, None, tied, context.passes)
        objective, extras = self.head(x, local_segments(labels), tied, context.passes)
        report = report._replace(extras=extras)
        if self.training and len(self.mtp):
            mtp_objective, mtp_report = self.mtp_objective(x, tokens, labels, context)
            objective, report = objective + mtp_objective, report.merged(mtp_report)
        return objective, report

    def mtp_objective(
        self, x: Tensor, tokens: Tensor, labels: Tensor, context: Context
    ) -> tuple[Tensor, PassReport]:
        """Returns the weighted objective of multi-token prediction, and the report of its modules.

        Args:
            x: `[S, B, D]`, the final stream after its norm, of this rank's segments.
            tokens, labels: those of full sequences.
            context: that of this rank's segments.
        """
        objectives, report = [], PassReport({}, {}, {})
        tied = self.embedding.weight_of("weight") if self.config.tied else None
        for depth, predictor in enumerate(self.mtp, start=1):
            # Shifting crosses segment boundaries, so it precedes the slicing into segments.
            next_tokens, next_labels = shift(tokens, labels, context.whole_documents, depth)
            next_tokens = self.local_segments(next_tokens)
            next_labels = self.local_segments(next_labels)
            x, module_report = predictor(x, self.embedding(next_tokens, context.positions), context)
            objectives.append(self.head(x, next_labels, tied, context.passes)[0])
            report = report.merged(module_report)
        first, *others = objectives
        total = sum(others, first) * (self.config.mtp_weight / len(self.mtp))
        return total, report._replace(extras={"mtp": total.detach()})

    def begin_step(self) -> None:
        """Begins an optimizer step: σReparam's singular vectors advance at their next use."""
        for module in self.modules():
            if isinstance(module, ParameterModule):
                module.due = module.transformed - module.fixed

    def end_step(self, loads: dict[int, Tensor]) -> None:
        """Ends an optimizer step: updates router biases by `loads`, those of the global batch."""
        loads_of: dict[Mixture, Tensor] = {}
        for wiring in self.wirings():
            for t in wiring.whole_row.indices:
                block, index = wiring.block(t) if wiring.has_block(t) else None, wiring.start + t
                if isinstance(block, Mixture) and self.config.router_bias:
                    loads_of[block] = loads_of.get(block, 0) + loads[index].double()
        for block, counts in loads_of.items():
            if "router_bias" not in block.small.frozen:
                block.small.update_bias(counts, self.config.router_bias_rate)


def duplicate_samples(tokens: Tensor, context: Context) -> tuple[Tensor, Context]:
    """Repeats the batch for THOR's two passes, which draw experts independently of each other.

    Each pass weighs half in balancing.
    """

    def repeat(t: Tensor) -> Tensor:
        return torch.cat([t, t], dim=-1)

    return repeat(tokens), dataclasses.replace(
        context,
        positions=repeat(context.positions),
        documents=None if context.documents is None else repeat(context.documents),
        samples=repeat(context.sample_indices()),
        groups=2 * context.groups,
        passes=2,
        tables={},
    )
