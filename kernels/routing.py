"""Routing of a mixture of experts: from logits to choices, capacity, and the losses that balance.

Shape letters: S sequence, B samples, E experts, k experts per token. A *balance group* is a number
of consecutive samples, whichever ranks hold them, so nothing here depends on the layout.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How experts are chosen and weighted.

    Attributes:
        top_k: experts per token.
        score: what a logit becomes: a `softmax` over experts (arXiv:2101.03961, eq. 1), or each
            expert's own `sigmoid` (DeepSeek-V3, arXiv:2412.19437).
        normalise: the weights of a token's experts are divided by their sum. The weight of a single
            expert never is: a weight that is always 1 would teach the router nothing.
        scale: a factor on every weight.
        groups: into how many groups of consecutive experts the experts fall.
        top_groups: how many groups a token's experts may come from; None for all. A group is as
            good as the sum of its two best experts (sigmoid: DeepSeek-V3) or as its best (softmax:
            DeepSeek-V2, arXiv:2405.04434).
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int | None = None


def route(logits: Tensor, rule: Rule, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts and weigh them.

    Args:
        logits: `[..., E]` in at least fp32.
        rule: how.
        bias: `[E]`, added to scores for the choice alone, not for the weight: balancing without a
            loss (arXiv:2408.15664). It gets no gradient.

    Returns:
        probabilities `[..., E]`, scores divided by their sum, for `balance_loss`; the chosen
        experts `[..., k]` int64, best first; and their weights `[..., k]`, dtype of `logits`.

    Raises:
        ValueError: the groups do not divide the experts, or hold too few to choose from.
    """
    chosen = _chosen(logits.detach(), rule, bias)
    # Both kinds of score are softmaxes of their logarithms once divided by a sum, and no sum
    # underflows: DeepSeek's 1e-20 in the denominator is not needed.
    log_score = F.logsigmoid(logits) if rule.score == "sigmoid" else logits
    probabilities = log_score.softmax(-1)
    if rule.normalise and rule.top_k > 1:
        weight = log_score.gather(-1, chosen).softmax(-1)
    else:
        scores = logits.sigmoid() if rule.score == "sigmoid" else probabilities
        weight = scores.gather(-1, chosen)
    return probabilities, chosen, weight if rule.scale == 1 else weight * rule.scale


def _chosen(logits: Tensor, rule: Rule, bias: Tensor | None) -> Tensor:
    """The best experts `[..., k]` by biased score, of the best groups."""
    scores = logits  # a softmax keeps their order
    if rule.score == "sigmoid":
        scores = logits.sigmoid()
    elif bias is not None:
        scores = logits.softmax(-1)
    if bias is not None:
        scores = scores + bias.detach()
    if rule.top_groups is not None:
        scores = _of_best_groups(scores, rule, rule.top_groups)
    return scores.topk(rule.top_k, dim=-1).indices


def _of_best_groups(scores: Tensor, rule: Rule, best: int) -> Tensor:
    """Scores, minus infinity outside a token's best groups."""
    E = scores.shape[-1]
    width, left = divmod(E, rule.groups)
    if left:
        raise ValueError(f"{rule.groups} groups do not divide {E} experts; choose a divisor")
    if best > rule.groups or best * width < rule.top_k:
        raise ValueError(
            f"top {best} of {rule.groups} groups of {width} experts cannot give {rule.top_k}; "
            f"change top_groups, groups or top_k"
        )
    grouped = scores.unflatten(-1, (rule.groups, width))
    counting = min(2, width) if rule.score == "sigmoid" else 1
    value = grouped.topk(counting, dim=-1).values.sum(-1)
    inside = torch.zeros_like(value, dtype=torch.bool)
    inside.scatter_(-1, value.topk(best, dim=-1).indices, True)
    return grouped.masked_fill(~inside.unsqueeze(-1), -torch.inf).flatten(-2)


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """⌈tokens · k / E · factor⌉ places per expert, the factor taken as its decimals read.

    In floating point 50 · 1.1 exceeds 55, and its ceiling is 56.
    """
    return math.ceil(Fraction(str(factor)) * tokens * top_k / experts)


def within_capacity(chosen: Tensor, experts: int, factor: float, samples: int) -> Tensor:
    """Which choices find a place at their expert, of `capacity` per expert and balance group.

    Places are given first come, first served: by sample, then position, then choice. In a group of
    one sample no token displaces an earlier one.

    Args:
        chosen: `[S, B, k]` int64 in `[0, experts)`.
        factor: capacity as a multiple of an even load.
        samples: samples per balance group, a divisor of B.

    Returns:
        `[S, B, k]` bool.
    """
    S, B, k = chosen.shape
    places = capacity(S * samples, k, experts, factor)
    groups = chosen.transpose(0, 1).reshape(B // samples, samples * S * k)
    queue = groups + experts * torch.arange(len(groups), device=chosen.device)[:, None]
    waiting, order = queue.flatten().sort(stable=True)  # every queue in its order of arrival
    number = torch.arange(len(waiting), device=chosen.device)
    kept = torch.empty_like(waiting, dtype=torch.bool)
    kept[order] = number - torch.searchsorted(waiting, waiting) < places
    return kept.view(B, S, k).transpose(0, 1)


def best_experts(probabilities: Tensor, top_k: int) -> Tensor:
    """Choose by score alone, whatever bias and groups steer the router's own choice.

    DeepSeek-V3's sequence-wise loss counts these (arXiv:2412.19437, eq. 18: the top k of s_{j,t}
    over all experts), as does Megatron.

    Args:
        probabilities: `[..., E]`, of `route`.

    Returns:
        expert numbers `[..., k]` int64, best first.
    """
    return probabilities.detach().topk(top_k, dim=-1).indices


def balance_loss(probabilities: Tensor, chosen: Tensor, samples: int) -> Tensor:
    """Load-balancing loss, summed over balance groups (arXiv:2101.03961, eqs. 4 to 6).

    Per group E · Σ_e f_e P_e, with f_e the share of the group's choices that fell on e, and P_e its
    mean probability. With one sample a group, and `best_experts` in place of the choices, it is
    DeepSeek-V3's sequence-wise loss (arXiv:2412.19437, eqs. 17 to 20).

    Args:
        probabilities: `[S, B, E]` in at least fp32, each token's summing to 1.
        chosen: `[S, B, k]` expert numbers, those dropped for want of capacity included.
        samples: samples per balance group, a divisor of B.
    """
    _, B, E = probabilities.shape
    mean = probabilities.unflatten(1, (B // samples, samples)).mean((0, 2))
    groups = chosen.transpose(0, 1).reshape(B // samples, -1)
    ones = torch.ones_like(groups, dtype=mean.dtype)
    count = torch.zeros_like(mean).scatter_add_(1, groups, ones)
    return E * (count / groups.shape[1] * mean).sum()


def router_z_loss(logits: Tensor, samples: int) -> Tensor:
    """Mean of logsumexp² over a group's tokens, summed over groups (arXiv:2202.08906, eq. 5).

    Args:
        logits: `[S, B, E]` in at least fp32.
        samples: samples per balance group, a divisor of B.
    """
    return logits.logsumexp(-1).square().mean(0).sum() / samples


def loads(chosen: Tensor, kept: Tensor | None, experts: int) -> Tensor:
    """Tokens per expert, `[experts]` int64, of choices `[..., k]`, those not kept left out."""
    ones = torch.ones_like(chosen) if kept is None else kept.long()
    count = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    return count.scatter_add_(0, chosen.flatten(), ones.flatten())
