"""`E`: a dropless mixture of experts with top-k routing."""

from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.kernels.activation import gated
from colonnade.kernels.experts import Order, combine, dispatch, expert_mlp
from colonnade.kernels.precision import wide
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context, attach
from colonnade.models.part import Part, normal


class Dispatched(NamedTuple):
    """Rows sorted by expert, how to undo it, and each choice's weight."""

    rows: Tensor  # [T*k, D]
    order: Order
    weight: Tensor  # [T, k]
    shape: torch.Size  # [S, B, D]


def balance_loss(logits: Tensor, chosen: Tensor, samples: int) -> Tensor:
    """Load-balancing loss, summed over balance groups (arXiv:2101.03961, eqs. 4 to 6).

    A group is `samples` consecutive samples, whichever ranks hold them: E · Σ_e f_e P_e, with f_e
    the share of the group's choices that fell on e, and P_e its mean probability.

    Args:
        logits: `[S, B, E]` in at least fp32.
        chosen: `[S, B, k]` expert numbers.
    """
    S, B, E = logits.shape
    mean = logits.softmax(-1).view(S, B // samples, samples, E).mean((0, 2))
    groups = chosen.transpose(0, 1).reshape(B // samples, -1)
    count = torch.zeros(B // samples, E, dtype=logits.dtype, device=logits.device)
    count.scatter_add_(1, groups, torch.ones_like(groups, dtype=logits.dtype))
    return E * (count / groups.shape[1] * mean).sum()


class Router(Part):
    """Scores of every expert, in at least fp32, and the top k with weights that sum to 1.

    A single expert's weight is its probability among all (arXiv:2101.03961, eq. 2): a weight that
    is always 1 would teach the router nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.declare("weight", (config.experts, config.hidden), normal(config.init_std))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = wide(x) @ wide(self.weight_of("weight")).T
        top, chosen = logits.topk(self.top_k, dim=-1)
        weight = top.softmax(-1) if self.top_k > 1 else logits.softmax(-1).gather(-1, chosen)
        return logits, chosen, weight


class Dispatch(Part):
    """Sort tokens by expert: `[S, B, D]` to `[S*B*k, D]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts = config.experts

    def forward(self, routed: tuple[Tensor, Tensor, Tensor]) -> Dispatched:
        x, chosen, weight = routed
        rows, order = dispatch(x.flatten(0, 1), chosen.flatten(0, 1), self.experts)
        return Dispatched(rows, order, weight.flatten(0, 1), x.shape)


class Experts(Part):
    """Every expert's MLP over its rows, and the weighted sum: back to `[S, B, D]`."""

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.activation = config.activation
        E, F, D = config.experts, config.expert_ffn or config.ffn, config.hidden
        for name in ("gate", "up") if gated(config.activation) else ("up",):
            self.declare(name, (E, F, D), normal(config.init_std))
        self.declare("down", (E, D, F), normal(out_std))

    def forward(self, sent: Dispatched, context: Context) -> Tensor:
        gate = self.weight_of("gate") if gated(self.activation) else None
        up, down = self.weight_of("up"), self.weight_of("down")
        rows = expert_mlp(sent.rows, sent.order.counts, gate, up, down, self.activation)
        return combine(rows, sent.order, sent.weight).view(sent.shape)


class Mixture(SubBlock):
    """Halves: `route, dispatch | experts, combine`."""

    small: Router

    def __init__(self, config: ModelConfig, out_std: float, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.small = Router(config)
        self.first, self.second = Dispatch(config), Experts(config, out_std)

    def begin(self, x: Tensor, context: Context) -> Dispatched:
        logits, chosen, weight = self.small(x)
        c = self.config
        if torch.is_grad_enabled() and (c.balance or c.router_z):
            term = c.balance * balance_loss(logits, chosen, c.balance_samples) / context.groups
            if c.router_z:  # arXiv:2202.08906, eq. 5: mean over tokens of logsumexp²
                z = logits.logsumexp(-1).square().mean(0).sum() / c.balance_samples
                term = term + c.router_z * z / context.groups
            context.terms[self.index] = term.detach()
            weight = attach(weight, term)
        return self.first((x, chosen, weight))

    def idle_weights(self) -> int:
        c = self.config
        matrices = 3 if gated(c.activation) else 2
        return (c.experts - c.top_k) * matrices * c.hidden * (c.expert_ffn or c.ffn)
