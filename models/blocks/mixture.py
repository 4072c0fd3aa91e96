"""`E`: a mixture of experts, dropless or with a capacity, behind a router."""

from collections.abc import Callable

import torch
from torch import Tensor

from colonnade.kernels.draws import draw_normal
from colonnade.kernels.precision import wide
from colonnade.kernels.routing import (
    RoutingOptions,
    balance_loss,
    best_experts,
    capacity,
    loads,
    route,
    router_z_loss,
    within_capacity,
)
from colonnade.models.blocks.experts import Dispatched, ExpertBlock, Routed
from colonnade.models.blocks.mlp import Coefficients
from colonnade.models.cards.base import Card
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context, attach
from colonnade.models.parameters import ParameterSpec, of_half
from colonnade.models.report import BlockReport
from colonnade.models.seams import Seam, identity


class Router(Coefficients):
    """Computes logits of all experts, `[S, B, E]`, in at least fp32; holds the bias on choices."""

    router_bias: Tensor  # [E], where configured

    def __init__(self, records: list[ParameterSpec], noise: float) -> None:
        super().__init__(records)
        self.noise = noise

    def forward(self, x: Tensor, context: Context) -> Tensor:
        logits = wide(x) @ wide(self.weight_of("router")).T
        if "router_offset" in self.specs:
            logits = logits + wide(self.weight_of("router_offset"))
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


class Mixture(ExpertBlock):
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
        c, records = config, card.records(config, out_std)
        super().__init__(card, c, records, Router(of_half(records, "small"), c.router_noise))
        self.routing = RoutingOptions(
            c.top_k, c.router_score, c.router_normalise, c.router_scale, c.router_groups,
            c.router_top_groups,
        )  # fmt: skip

    def begin(self, x: Tensor, context: Context) -> Dispatched:
        c, logits = self.config, self.small(x, context)
        bias = self.small.router_bias if c.router_bias else None
        probabilities, chosen, weight = route(logits, self.routing, bias)
        if not self.training:  # only training drops choices and has balancing losses
            return self.first(Routed(x, chosen, None, weight))
        keep_mask, bound = None, None
        if c.capacity is not None:
            # Earlier tokens of a sequence take an expert's capacity first, so the mask is computed
            # from the choices of the full sequence.
            all_chosen = self.full_sequence(chosen)
            keep_mask = within_capacity(all_chosen, c.experts, c.capacity, c.balance_samples)
            keep_mask = self.local_segments(keep_mask)
            S, B, _ = all_chosen.shape
            limit = capacity(S * c.balance_samples, c.top_k, c.experts, c.capacity)
            bound = limit * (B // c.balance_samples)
        term = None
        if c.balance or c.balance_sequence or c.router_z:
            term = self.losses(logits, probabilities, chosen) / context.groups
            # Attached before dispatch, because `combine` uses the weights: backward through them
            # then also runs backward through the losses.
            weight = self.attach(weight, term)
        report = BlockReport(
            loads(chosen, None, c.experts), None if term is None else term.detach()
        )
        return self.first(Routed(x, chosen, keep_mask, weight, bound))._replace(report=report)

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
