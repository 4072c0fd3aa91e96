"""The language model: embedding, wiring, head, and heads for further tokens."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colonnade.kernels.linear import linear
from colonnade.kernels.loss import linear_consistency, linear_objective
from colonnade.models import records
from colonnade.models.blocks.mixture import Mixture
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.mtp import Predictor, shifted
from colonnade.models.names import CanonicalNames
from colonnade.models.part import Part
from colonnade.models.reparam import reparametrise
from colonnade.models.seams import same
from colonnade.models.wiring import Wiring


class Embedding(Part):
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


class Head(Part):
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
        self, x: Tensor, labels: Tensor | None, tied: Tensor | None, context: Context
    ) -> Tensor:
        weight = self.weight_of("weight") if tied is None else tied
        x = self.enter(x if self.scale == 1.0 else x * self.scale)
        if labels is None:
            logits = self.gather(linear(x, weight))
            return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        flat, z = labels.flatten(), self.z if torch.is_grad_enabled() else 0.0
        if context.passes == 2:
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
            context.extras["consistency"] = consistency
            context.extras["second_pass"] = objective.detach() - mean - consistency  # and z
            return objective
        rows = x.flatten(0, 1)
        objective, extra = linear_objective(
            rows, weight, flat, self.chunk, cap=self.cap, z=z, sharding=self.sharding
        )
        if z:
            context.extras["logit_z"] = extra
        return objective


class Decoder(CanonicalNames):
    """A decoder over a pattern of sub-blocks, written for one device.

    Its weights are drawn from PyTorch's own generator. Made on the meta device it has none, and
    refuses to compute: `parallel.materialise` has `new_decoder`, of the weights that a run of a
    seed begins with, and `load_decoder`, of given ones.

    `mine` is a seam: of a whole sequence `[S, ...]` the part that is worked on here. Where there is
    a memory, as in generation, sequences are not shared.
    """

    def __init__(self, config: ModelConfig, loss_chunk: int = 1024) -> None:
        super().__init__()
        self.config = config
        self.mine: Callable[[Tensor], Tensor] = same
        distinct = len(config.pattern) if config.share else len(config.symbols)
        self.embedding = Embedding(config)
        self.wiring = Wiring(config, config.symbols, distinct)
        self.head = Head(config, loss_chunk)
        self.mtp = nn.ModuleList(Predictor(config, depth) for depth in range(config.mtp))
        reparametrise(self)
        if not self.embedding.weight.is_meta:  # nobody computes with what memory held
            for module in self.modules():
                if isinstance(module, Part):
                    module.fill()

    def wirings(self) -> Iterator[Wiring]:
        """All rows of sub-blocks: the model's own, and those of the further tokens' modules."""
        yield self.wiring
        for predictor in self.mtp:
            assert isinstance(predictor, Predictor)
            yield predictor.wiring

    def forward(self, tokens: Tensor, context: Context, labels: Tensor | None = None) -> Tensor:
        """Objective or logits.

        Args:
            tokens: `[S, B]` integers.
            context: positions and documents of these tokens, and balance groups.
            labels: `[S, B]` integers, −100 where there is no loss; None for logits.

        Returns:
            the objective, summed over valid tokens, a scalar in at least fp32: the negative log
            likelihood and what `context.extras` then names; without labels the logits `[S, B, V]`.
            Where ranks share a sequence, both are those of this rank's part.

        Raises:
            RuntimeError: the model has no weights.
        """
        if self.embedding.weight.is_meta and not tokens.is_meta:
            raise RuntimeError(
                "the model has no weights yet: build it by new_decoder(config, seed) or "
                "load_decoder(config, tensors) of colonnade.parallel.materialise"
            )
        training = labels is not None and torch.is_grad_enabled()
        if training and self.config.has("T"):
            tokens, context = doubled(tokens, context)
        whole, mine = context, self.mine
        if context.memory is not None:
            mine = same
        context = context.part(mine)
        x = self.wiring(self.embedding(mine(tokens)), context)
        tied = self.embedding.weight_of("weight") if self.config.tied else None
        objective = self.head(x, None if labels is None else mine(labels), tied, context)
        if not training or not len(self.mtp):
            return objective
        assert labels is not None
        further = objective.new_zeros(())
        for depth, predictor in enumerate(self.mtp, start=1):
            ahead, wanted = shifted(tokens, labels, whole, depth)
            x = predictor(x, self.embedding(mine(ahead)), context)
            apart = dataclasses.replace(context, extras={})
            further = further + self.head(x, mine(wanted), tied, apart)
        further = further * (self.config.mtp_weight / len(self.mtp))
        context.extras["mtp"] = further.detach()
        return objective + further

    def begin_step(self) -> None:
        """An optimizer step begins: what changes once a step may do so at its next use."""
        for module in self.modules():
            if isinstance(module, Part):
                module.due = module.transformed

    def end_step(self, loads: dict[int, Tensor]) -> None:
        """An optimizer step is done; `loads` are `Context.loads` over the whole global batch."""
        steered: dict[Mixture, Tensor] = {}
        for wiring in self.wirings():
            for t in range(len(wiring.late)):
                block, place = wiring.block(t), wiring.start + t
                if isinstance(block, Mixture) and self.config.router_bias:
                    steered[block] = steered.get(block, 0) + loads[place].double()
        for block, counts in steered.items():
            block.small.steer(counts, self.config.router_bias_rate)


def doubled(tokens: Tensor, context: Context) -> tuple[Tensor, Context]:
    """Every sample twice, for two passes with draws of their own; each weighs half in balancing."""

    def twice(t: Tensor) -> Tensor:
        return torch.cat([t, t], dim=-1)

    return twice(tokens), dataclasses.replace(
        context,
        positions=twice(context.positions),
        documents=None if context.documents is None else twice(context.documents),
        samples=twice(context.sample_numbers()),
        groups=2 * context.groups,
        passes=2,
        _cache={},
    )
