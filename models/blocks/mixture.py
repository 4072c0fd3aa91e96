"""`E`: a mixture of experts, dropless or with a capacity, behind a router."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.kernels.activation import activated_linear
from colonnade.kernels.draws import draw_normal
from colonnade.kernels.experts import DispatchOrder, combine, dispatch, expert_mlp
from colonnade.kernels.linear import linear
from colonnade.kernels.precision import wide
from colonnade.kernels.routing import (
    RoutingOptions,
    balance_loss,
    best_experts,
    loads,
    route,
    router_z_loss,
    within_capacity,
)
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.mlp import Coefficients
from colonnade.models.cards.base import Card
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context, attach
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, of_half
from colonnade.models.report import BlockReport
from colonnade.models.seams import Seam, same


class Dispatched(NamedTuple):
    """Rows sorted by expert, how to undo it, each choice's weight; the shared expert's input."""

    rows: Tensor  # [M, D], at most T*k rows
    order: DispatchOrder
    weight: Tensor  # [T, k]
    shape: torch.Size  # [S, B, D]
    shared: tuple[Tensor, Tensor | None] | None  # [S, B, F] up and gate
    opening: Tensor | None  # [S, B, 1] gate on the shared expert, before the sigmoid
    report: BlockReport | None = None  # of a router in training


class Router(Coefficients):
    """Scores of every expert, `[S, B, E]`, in at least fp32, and the bias that steers choices."""

    router_bias: Tensor  # [E], where configured

    def __init__(self, records: list[ParameterSpec], noise: float) -> None:
        super().__init__(records)
        self.noise = noise

    def forward(self, x: Tensor, context: Context) -> Tensor:
        logits = wide(x) @ wide(self.weight_of("router")).T
        if self.noise and self.training:
            S, _, E = logits.shape
            place = torch.arange(S) if context.token_index is None else context.token_index
            place = place.to(x.device)[:, None, None]
            columns = context.sample_numbers()[:, None], context.pass_index()[:, None]
            keys = *columns, place, torch.arange(E, device=x.device)
            drawn = draw_normal(context.rng_key, context.index, *keys, dtype=logits.dtype)
            logits = logits + self.noise * drawn
        return logits

    @torch.no_grad()
    def steer(self, counts: Tensor, rate: float) -> None:
        """Favour experts with less than the mean load, `[E]` of a batch (arXiv:2408.15664)."""
        self.router_bias += rate * (counts.mean() - counts).sign().to(self.router_bias)


class Dispatch(ParameterModule):
    """Sort tokens by expert, and start the shared expert: `[S, B, D]` to `[M, D]`."""

    seams = ()

    def __init__(self, records: list[ParameterSpec], experts: int) -> None:
        super().__init__(records)
        self.experts = experts

    def forward(self, routed: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> Dispatched:
        x, chosen, kept, weight = routed
        rows, order = dispatch(
            x.flatten(0, 1),
            chosen.flatten(0, 1),
            self.experts,
            None if kept is None else kept.flatten(0, 1),
        )
        shared, opening = None, None
        if "shared_up" in self.specs:
            gated = "shared_gate" in self.specs
            gate = linear(x, self.weight_of("shared_gate")) if gated else None
            shared = linear(x, self.weight_of("shared_up")), gate
        if "shared_open" in self.specs:
            opening = linear(x, self.weight_of("shared_open"))
        return Dispatched(rows, order, weight.flatten(0, 1), x.shape, shared, opening)


class Experts(ParameterModule):
    """Every expert's MLP over its rows, and the weighted sum: back to `[S, B, D]`."""

    seams = ()

    def __init__(self, records: list[ParameterSpec], activation: str) -> None:
        super().__init__(records)
        self.activation = activation

    def forward(self, carried: tuple[Dispatched, Tensor | None], context: Context) -> Tensor:
        sent, poly = carried
        gate = self.weight_of("gate") if "gate" in self.specs else None
        up, down = self.weight_of("up"), self.weight_of("down")
        counts, kind = sent.order.counts, self.activation
        rows = expert_mlp(sent.rows, counts, gate, up, down, kind, poly, self.sharding)
        y = combine(rows, sent.order, sent.weight).view(sent.shape)
        if sent.shared is None:
            return y
        down = self.weight_of("shared_down")
        shared = activated_linear(*sent.shared, down, self.activation, poly, self.sharding)
        return y + (shared if sent.opening is None else shared * sent.opening.sigmoid())


class Mixture(SubBlock):
    """Halves: `route, dispatch | experts, combine`.

    Seams: `attach`, where several ranks compute the same balancing losses, has them count once;
    where each has a part of a sequence, `share` of it all, `whole` puts the parts of all together,
    and `mine` takes this rank's.
    """

    seams = Seam("attach", attach), Seam("whole", same), Seam("mine", same)
    attach: Callable[[Tensor, Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]
    mine: Callable[[Tensor], Tensor]

    small: Router

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        c = self.config = config
        records = card.records(config, out_std)
        self.rule = RoutingOptions(
            c.top_k, c.router_score, c.router_normalise, c.router_scale, c.router_groups,
            c.router_top_groups,
        )  # fmt: skip
        self.small = Router(of_half(records, "small"), c.router_noise)
        self.first = Dispatch(of_half(records, "first"), c.experts)
        self.second = Experts(of_half(records, "second"), c.activation)

    def begin(self, x: Tensor, context: Context) -> Dispatched:
        c, logits = self.config, self.small(x, context)
        bias = self.small.router_bias if c.router_bias else None
        probabilities, chosen, weight = route(logits, self.rule, bias)
        kept = None
        if c.capacity is not None and self.training:  # only training drops choices
            everyone = self.whole(chosen)
            kept = self.mine(within_capacity(everyone, c.experts, c.capacity, c.balance_samples))
        if not self.training:
            return self.first((x, chosen, kept, weight))
        term = None
        if c.balance or c.balance_sequence or c.router_z:
            term = self.losses(logits, probabilities, chosen) / context.groups
            weight = self.attach(weight, term)
        found = BlockReport(loads(chosen, None, c.experts), None if term is None else term.detach())
        return self.first((x, chosen, kept, weight))._replace(report=found)

    def report(self, carried: Dispatched) -> BlockReport | None:
        return carried.report

    def losses(self, logits: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """Balancing terms, summed over balance groups; a sample's own weigh 1/samples each.

        Of a part of a sequence, that part's share: how often experts were chosen counts in all.
        """
        c, samples = self.config, self.config.balance_samples
        term = logits.new_zeros(())
        if c.balance:
            everyone = self.whole(chosen)
            term = term + c.balance * balance_loss(probabilities, everyone, samples)
        if c.balance_sequence:
            best = self.whole(best_experts(probabilities, c.top_k))
            alone = balance_loss(probabilities, best, 1) / samples
            term = term + c.balance_sequence * alone
        if c.router_z:
            term = term + c.router_z * router_z_loss(logits, samples)
        return term * self.share

    def finish(self, carried: Dispatched, context: Context) -> Tensor:
        return self.second((carried, self.small.values()), context)
