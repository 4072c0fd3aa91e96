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
from colonnade.models.seams import Seam, identity


class Dispatched(NamedTuple):
    """The result of the first half: rows sorted by expert, and all that `combine` needs."""

    rows: Tensor  # [M, D], sorted by expert, at most T*k rows
    order: DispatchOrder  # inverts the sort
    weight: Tensor  # [T, k], of each choice
    shape: torch.Size  # [S, B, D]
    shared: tuple[Tensor, Tensor | None] | None  # [S, B, F] up and gate of the shared expert
    shared_gate: Tensor | None  # [S, B, 1] gate on the shared expert, before the sigmoid
    report: BlockReport | None = None  # in training, where there is a router


class Router(Coefficients):
    """Computes logits of all experts, `[S, B, E]`, in at least fp32; holds the bias on choices."""

    router_bias: Tensor  # [E], where configured

    def __init__(self, records: list[ParameterSpec], noise: float) -> None:
        super().__init__(records)
        self.noise = noise

    def forward(self, x: Tensor, context: Context) -> Tensor:
        logits = wide(x) @ wide(self.weight_of("router")).T
        if self.noise and self.training:
            S, _, E = logits.shape
            # Keyed by sample and by token index in the full sequence: alike on every layout.
            tokens = torch.arange(S) if context.token_index is None else context.token_index
            tokens = tokens.to(x.device)[:, None, None]
            columns = context.sample_indices()[:, None], context.pass_index()[:, None]
            keys = *columns, tokens, torch.arange(E, device=x.device)
            noise = draw_normal(context.rng_key, context.index, *keys, dtype=logits.dtype)
            logits = logits + self.noise * noise
        return logits

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float) -> None:
        """Raises the bias of experts below the mean load, lowers others' (arXiv:2408.15664).

        `counts` are the loads `[E]` of the global batch.
        """
        self.router_bias += rate * (counts.mean() - counts).sign().to(self.router_bias)


class Dispatch(ParameterModule):
    """Sorts tokens by expert, `[S, B, D]` to `[M, D]`, and runs the shared expert's first half."""

    seams = ()

    def __init__(self, records: list[ParameterSpec], experts: int) -> None:
        super().__init__(records)
        self.experts = experts

    def forward(self, routed: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> Dispatched:
        x, chosen, keep_mask, weight = routed
        rows, order = dispatch(
            x.flatten(0, 1),
            chosen.flatten(0, 1),
            self.experts,
            None if keep_mask is None else keep_mask.flatten(0, 1),
        )
        shared, shared_gate = None, None
        if "shared_up" in self.specs:
            gated = "shared_gate" in self.specs
            gate = linear(x, self.weight_of("shared_gate")) if gated else None
            shared = linear(x, self.weight_of("shared_up")), gate
        if "shared_open" in self.specs:
            shared_gate = linear(x, self.weight_of("shared_open"))
        return Dispatched(rows, order, weight.flatten(0, 1), x.shape, shared, shared_gate)


class Experts(ParameterModule):
    """Runs every expert's MLP on its rows, and sums them by weight, back to `[S, B, D]`."""

    seams = ()

    def __init__(self, records: list[ParameterSpec], activation: str) -> None:
        super().__init__(records)
        self.activation = activation

    def forward(self, carried: tuple[Dispatched, Tensor | None], context: Context) -> Tensor:
        dispatched, poly = carried
        gate = self.weight_of("gate") if "gate" in self.specs else None
        up, down = self.weight_of("up"), self.weight_of("down")
        order, kind = dispatched.order, self.activation
        rows = dispatched.rows
        rows = expert_mlp(rows, order.counts, gate, up, down, kind, poly, self.sharding)
        y = combine(rows, order, dispatched.weight).view(dispatched.shape)
        if dispatched.shared is None:
            return y
        down = self.weight_of("shared_down")
        shared = activated_linear(*dispatched.shared, down, kind, poly, self.sharding)
        if dispatched.shared_gate is not None:
            shared = shared * dispatched.shared_gate.sigmoid()
        return y + shared


class Mixture(SubBlock):
    """Halves: `route, dispatch | experts, combine`.

    Seams: `attach` adds a balancing loss to the objective; where tensor-parallel ranks compute the
    same loss, it counts once. Under context parallelism `full_sequence` all-gathers the segments of
    a sequence, without gradient, and `local_segments` slices this rank's; `sequence_share` is the
    fraction of the sequence in them.
    """

    seams = (
        Seam("attach", attach),
        Seam("full_sequence", identity),
        Seam("local_segments", identity),
    )
    attach: Callable[[Tensor, Tensor], Tensor]
    full_sequence: Callable[[Tensor], Tensor]
    local_segments: Callable[[Tensor], Tensor]

    small: Router

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        c = self.config = config
        records = card.records(config, out_std)
        self.routing = RoutingOptions(
            c.top_k, c.router_score, c.router_normalise, c.router_scale, c.router_groups,
            c.router_top_groups,
        )  # fmt: skip
        self.small = Router(of_half(records, "small"), c.router_noise)
        self.first = Dispatch(of_half(records, "first"), c.experts)
        self.second = Experts(of_half(records, "second"), c.activation)

    def begin(self, x: Tensor, context: Context) -> Dispatched:
        c, logits = self.config, self.small(x, context)
        bias = self.small.router_bias if c.router_bias else None
        probabilities, chosen, weight = route(logits, self.routing, bias)
        if not self.training:  # only training drops choices and has balancing losses
            return self.first((x, chosen, None, weight))
        keep_mask = None
        if c.capacity is not None:
            # Earlier tokens of a sequence take an expert's capacity first, so the mask is computed
            # from the choices of the full sequence.
            all_chosen = self.full_sequence(chosen)
            keep_mask = within_capacity(all_chosen, c.experts, c.capacity, c.balance_samples)
            keep_mask = self.local_segments(keep_mask)
        term = None
        if c.balance or c.balance_sequence or c.router_z:
            term = self.losses(logits, probabilities, chosen) / context.groups
            # Attached before dispatch, because `combine` uses the weights: backward through them
            # then also runs backward through the losses.
            weight = self.attach(weight, term)
        report = BlockReport(
            loads(chosen, None, c.experts), None if term is None else term.detach()
        )
        return self.first((x, chosen, keep_mask, weight))._replace(report=report)

    def report(self, carried: Dispatched) -> BlockReport | None:
        return carried.report

    def losses(self, logits: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """Returns the balancing losses, summed over balance groups.

        The loss of each sample (`balance_sequence`) weighs 1/balance_samples. Under context
        parallelism it is the segments' share of the loss: probabilities are those of the segments,
        while the choices are counted over the full sequence. The ranks' shares sum to the loss.
        """
        c, samples = self.config, self.config.balance_samples
        term = logits.new_zeros(())
        if c.balance:
            all_chosen = self.full_sequence(chosen)
            term = term + c.balance * balance_loss(probabilities, all_chosen, samples)
        if c.balance_sequence:
            best = self.full_sequence(best_experts(probabilities, c.top_k))
            per_sample = balance_loss(probabilities, best, 1) / samples
            term = term + c.balance_sequence * per_sample
        if c.router_z:
            term = term + c.router_z * router_z_loss(logits, samples)
        return term * self.sequence_share

    def finish(self, carried: Dispatched, context: Context) -> Tensor:
        return self.second((carried, self.small.values()), context)
