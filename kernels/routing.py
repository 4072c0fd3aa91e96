"""Routing of a mixture of experts: choices from logits, capacity, and balancing losses.

Shape letters: S sequence, B samples, E experts, k experts per token. A *balance group* is a fixed
number of consecutive samples, whichever ranks hold them, so nothing depends on the layout.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RoutingOptions:
    """How experts are chosen and weighted.

    Attributes:
        top_k: experts per token.
        score: how logits become scores: by a `softmax` over experts (arXiv:2101.03961, eq. 1), or
            by a `sigmoid` of each logit (DeepSeek-V3, arXiv:2412.19437).
        normalise: whether the weights of a token's experts are divided by their sum. The weight of
            a single expert never is: a weight that is always 1 would give the router no gradient.
        scale: a factor on every weight.
        groups: number of groups of consecutive experts.
        top_groups: number of groups from which a token's experts may come; None for all. The score
            of a group is the sum of its two highest scores (sigmoid: DeepSeek-V3) or its highest
            score (softmax: DeepSeek-V2, arXiv:2405.04434).
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int | None = None


def route(
    logits: Tensor, options: RoutingOptions, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses experts and gives them weights.

    Args:
        logits: `[..., E]` in at least fp32.
        options: how experts are chosen and weighted.
        bias: `[E]`, added to scores for the choice only, not for the weight: auxiliary-loss-free
            balancing (arXiv:2408.15664). It gets no gradient.

    Returns:
        probabilities `[..., E]`, scores divided by their sum, for `balance_loss`; the chosen
        experts `[..., k]` int64, best first; and their weights `[..., k]`, dtype of `logits`.

    Raises:
        ValueError: the groups do not divide the experts, or hold too few to choose from.
    """
    chosen = _choose(logits.detach(), options, bias)
    # Scores of either kind divided by their sum are the softmax of their logarithms, in which no
    # sum underflows: DeepSeek's 1e-20 in the denominator is not needed.
    log_score = F.logsigmoid(logits) if options.score == "sigmoid" else logits
    probabilities = log_score.softmax(-1)
    if options.normalise and options.top_k > 1:
        weight = log_score.gather(-1, chosen).softmax(-1)
    else:
        scores = logits.sigmoid() if options.score == "sigmoid" else probabilities
        weight = scores.gather(-1, chosen)
    return probabilities, chosen, weight if options.scale == 1 else weight * options.scale


def _choose(logits: Tensor, options: RoutingOptions, bias: Tensor | None) -> Tensor:
    """The best experts `[..., k]` by biased score, from the best groups."""
    scores = logits  # a softmax would not change their order
    if options.score == "sigmoid":
        scores = logits.sigmoid()
    elif bias is not None:
        scores = logits.softmax(-1)
    if bias is not None:
        scores = scores + bias.detach()
    if options.top_groups is not None:
        scores = _mask_groups(scores, options, options.top_groups)
    return scores.topk(options.top_k, dim=-1).indices


def _mask_groups(scores: Tensor, options: RoutingOptions, top_groups: int) -> Tensor:
    """Scores, with minus infinity outside a token's best groups."""
    E = scores.shape[-1]
    width, remainder = divmod(E, options.groups)
    if remainder:
        raise ValueError(f"{options.groups} groups do not divide {E} experts; choose a divisor")
    if top_groups > options.groups or top_groups * width < options.top_k:
        raise ValueError(
            f"top {top_groups} of {options.groups} groups of {width} experts cannot give "
            f"{options.top_k}; change top_groups, groups or top_k"
        )
    grouped = scores.unflatten(-1, (options.groups, width))
    summed_experts = min(2, width) if options.score == "sigmoid" else 1
    group_score = grouped.topk(summed_experts, dim=-1).values.sum(-1)
    selected = torch.zeros_like(group_score, dtype=torch.bool)
    selected.scatter_(-1, group_score.topk(top_groups, dim=-1).indices, True)
    return grouped.masked_fill(~selected.unsqueeze(-1), -torch.inf).flatten(-2)


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """⌈tokens · k / E · factor⌉, the tokens that an expert accepts, computed in exact fractions.

    The factor is the decimal number as it is printed: in floating point 50 · 1.1 exceeds 55, and
    its ceiling is 56.
    """
    return math.ceil(Fraction(str(factor)) * tokens * top_k / experts)


def within_capacity(chosen: Tensor, experts: int, factor: float, samples: int) -> Tensor:
    """Which choices their expert accepts, up to `capacity` per expert and balance group.

    First come, first served: in the order of sample, then position, then choice. In a group of one
    sample no token displaces an earlier one.

    Args:
        chosen: `[S, B, k]` int64 in `[0, experts)`.
        factor: capacity as a multiple of an even load.
        samples: samples per balance group, a divisor of B.

    Returns:
        `[S, B, k]` bool, the keep mask: False for choices that are dropped.
    """
    S, B, k = chosen.shape
    limit = capacity(S * samples, k, experts, factor)
    groups = chosen.transpose(0, 1).reshape(B // samples, samples * S * k)
    # One queue for each balance group and expert; a stable sort keeps the order of arrival.
    queue = groups + experts * torch.arange(len(groups), device=chosen.device)[:, None]
    sorted_queue, order = queue.flatten().sort(stable=True)
    index = torch.arange(len(sorted_queue), device=chosen.device)
    keep_mask = torch.empty_like(sorted_queue, dtype=torch.bool)
    keep_mask[order] = index - torch.searchsorted(sorted_queue, sorted_queue) < limit
    return keep_mask.view(B, S, k).transpose(0, 1)


def best_experts(probabilities: Tensor, top_k: int) -> Tensor:
    """Chooses by score only, without the bias and groups of the router's choice.

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

    Per group E · Σ_e f_e P_e, with f_e the share of the group's choices that chose e, and P_e its
    mean probability. With one sample a group, and `best_experts` in place of the choices, it is
    DeepSeek-V3's sequence-wise loss (arXiv:2412.19437, eqs. 17 to 20).

    Args:
        probabilities: `[S, B, E]` in at least fp32, each token's summing to 1.
        chosen: `[S, B, k]` expert numbers, including those dropped because of capacity.
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


def loads(chosen: Tensor, keep_mask: Tensor | None, experts: int) -> Tensor:
    """Tokens per expert, `[experts]` int64, of the choices `[..., k]` that `keep_mask` keeps."""
    ones = torch.ones_like(chosen) if keep_mask is None else keep_mask.long()
    count = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    return count.scatter_add_(0, chosen.flatten(), ones.flatten())
