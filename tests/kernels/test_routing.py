"""Routing against transformers' routers, plain loops, and the losses' formulas, in fp64."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from equal import assert_equal
from shown import Row
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

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

TABLE = [
    Row("E", "group-limited softmax router", "transformers DeepSeek-V2"),
    Row("E", "capacity; auxiliary, sequence and z-losses", "plain loops and formulas"),
]

S, B, E, D = 7, 4, 8, 5


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def choices(S: int, B: int, k: int, E: int, seed: int = 0) -> Tensor:
    """Uneven choices, so that some experts exceed their capacity."""
    preference = torch.linspace(1, 0, E, dtype=torch.float64)
    return (random(S, B, E, seed=seed) + preference).topk(k, dim=-1).indices


def mixtral(k: int) -> tuple[nn.Module, RoutingOptions]:
    config = MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=k)
    return MixtralTopKRouter(config), RoutingOptions(k)


def qwen3(k: int, normalise: bool) -> tuple[nn.Module, RoutingOptions]:
    config = Qwen3MoeConfig(
        hidden_size=D, num_experts=E, num_experts_per_tok=k, norm_topk_prob=normalise
    )
    return Qwen3MoeTopKRouter(config), RoutingOptions(k, normalise=normalise)


def deepseek2(
    k: int, groups: int, top: int, scale: float = 1.5
) -> tuple[nn.Module, RoutingOptions]:
    config = DeepseekV2Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=k, n_group=groups, topk_group=top,
        topk_method="group_limited_greedy", routed_scaling_factor=scale, num_attention_heads=1,
    )  # fmt: skip
    options = RoutingOptions(k, normalise=False, scale=scale, groups=groups, top_groups=top)
    return DeepseekV2TopkRouter(config), options


def deepseek3(
    k: int, groups: int, top: int, normalise: bool = True, scale: float = 2.5
) -> tuple[nn.Module, RoutingOptions]:
    config = DeepseekV3Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=k, n_group=groups, topk_group=top,
        norm_topk_prob=normalise, routed_scaling_factor=scale,
    )  # fmt: skip
    return DeepseekV3TopkRouter(config), RoutingOptions(k, "sigmoid", normalise, scale, groups, top)


ROUTERS: dict[str, Callable[[], tuple[Any, RoutingOptions]]] = {
    "mixtral": lambda: mixtral(2),
    "mixtral-all": lambda: mixtral(E),
    "qwen3": lambda: qwen3(3, True),
    "qwen3-unnormalised": lambda: qwen3(3, False),
    "switch": lambda: qwen3(1, False),
    "deepseek2": lambda: deepseek2(2, 4, 2),
    "deepseek2-one-group": lambda: deepseek2(4, 2, 1),
    "deepseek3": lambda: deepseek3(3, 4, 2),
    "deepseek3-two-groups": lambda: deepseek3(3, 2, 1),
    "deepseek3-all-groups": lambda: deepseek3(4, 4, 4, scale=1.0),
    "deepseek3-unnormalised": lambda: deepseek3(3, 4, 2, normalise=False),
    "deepseek3-single": lambda: deepseek3(1, 4, 1, normalise=False),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_equals_hugging_face(name: str) -> None:
    """The weight of each expert for each token, and the router's gradient."""
    x, grad = random(B * S, D, seed=1), random(B * S, E, seed=2)
    with oracle.fp64():
        router, options = ROUTERS[name]()
        router = router.to(torch.float64)
        oracle.randomise(router, seed=3)
        biased = hasattr(router, "e_score_correction_bias")
        if biased:  # as large as differences of scores, so that it changes choices
            router.e_score_correction_bias.copy_(random(E, seed=4, scale=0.2))
        _, theirs, chosen = router(x)
    dense = torch.zeros(B * S, E, dtype=torch.float64).scatter(1, chosen, theirs)
    (dense * grad).sum().backward()

    weight = router.weight.detach().clone().requires_grad_()
    bias = router.e_score_correction_bias if biased else None
    probabilities, ours, got = route((x @ weight.T).view(B, S, E), options, bias)
    assert ours.shape == got.shape == (B, S, options.top_k)
    ours_dense = torch.zeros(B, S, E, dtype=torch.float64).scatter(2, ours, got).view(B * S, E)
    (gradient,) = torch.autograd.grad((ours_dense * grad).sum(), weight)
    assert_equal(
        {"weight": ours_dense.detach(), "gradient": gradient},
        {"weight": dense.detach(), "gradient": router.weight.grad},
        of_all=0,
    )
    scores = (x @ weight.T).sigmoid() if options.score == "sigmoid" else (x @ weight.T).exp()
    expected = (scores / scores.sum(1, keepdim=True)).detach()
    assert_equal({"p": probabilities.detach().view(B * S, E)}, {"p": expected}, of_all=0)
    if bias is not None:  # the test would miss a bias that changes no choice
        assert (route((x @ weight.T).view(B, S, E), options)[1] != ours).any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_weight_of_a_single_expert_has_a_gradient(score: Any) -> None:
    logits = random(S, B, E).requires_grad_()
    probabilities, chosen, weight = route(logits, RoutingOptions(1, score))
    absolute = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    assert torch.equal(weight, absolute.gather(-1, chosen))
    assert torch.equal(chosen, logits.argmax(-1, keepdim=True))
    (gradient,) = torch.autograd.grad(weight.sum(), logits)
    assert (gradient.abs().sum(-1) > 1e-3).all()
    assert_equal({"sum": probabilities.sum(-1).detach()}, {"sum": torch.ones(S, B)})


def test_bias_on_a_softmax_changes_choices_not_weights() -> None:
    logits, bias = random(S, B, E).requires_grad_(), random(E, seed=1).requires_grad_()
    _, chosen, weight = route(logits, RoutingOptions(2), bias)
    expected = (logits.softmax(-1) + bias).topk(2, dim=-1).indices
    assert torch.equal(chosen, expected)
    assert_equal(
        {"w": weight.detach()}, {"w": logits.gather(-1, chosen).softmax(-1).detach()}, of_all=0
    )
    weight.square().sum().backward()
    assert bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 500.0, -500.0])
def test_extreme_logits_stay_finite(value: float, dtype: torch.dtype) -> None:
    for score, normalise in itertools.product(("softmax", "sigmoid"), (True, False)):
        logits = torch.full((S, B, E), value, dtype=dtype)
        logits[0, 0, 0] += 1000
        logits.requires_grad_()
        options = RoutingOptions(2, score, normalise, 1.0, 4, 2)  # type: ignore[arg-type]
        probabilities, _, weight = route(logits, options)
        assert probabilities.dtype == weight.dtype == dtype
        (gradient,) = torch.autograd.grad(weight.sum() + probabilities.square().sum(), logits)
        assert all(t.isfinite().all() for t in (probabilities, weight, gradient))
        assert torch.allclose(probabilities.sum(-1), torch.ones(S, B, dtype=dtype))


@pytest.mark.parametrize(("k", "groups", "top"), [(2, 3, 1), (3, 4, 1), (2, 4, 5)])
def test_impossible_groups_are_refused(k: int, groups: int, top: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        route(random(S, B, E), RoutingOptions(k, groups=groups, top_groups=top))


def within_queue(chosen: Tensor, experts: int, limit: int, samples: int) -> Tensor:
    """`within_capacity` by a loop with one queue per expert."""
    S, B, k = chosen.shape
    keep_mask = torch.zeros(S, B, k, dtype=torch.bool)
    for first in range(0, B, samples):
        taken = [0] * experts
        for b, s, j in itertools.product(range(first, first + samples), range(S), range(k)):
            e = int(chosen[s, b, j])
            keep_mask[s, b, j] = taken[e] < limit
            taken[e] += 1
    return keep_mask


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 8.0])
@pytest.mark.parametrize(("k", "E"), [(1, 3), (2, 5), (3, 8)])
def test_capacity_equals_a_queue(samples: int, factor: float, k: int, E: int) -> None:
    chosen = choices(13, 4, k, E)
    keep_mask = within_capacity(chosen, E, factor, samples)
    limit = math.ceil(13 * samples * k / E * factor - 1e-9)
    assert torch.equal(keep_mask, within_queue(chosen, E, limit, samples))
    assert keep_mask.all() == (factor == 8)
    assert torch.equal(keep_mask, within_capacity(chosen, E, factor, samples))


def test_capacity_is_the_ceiling_of_the_decimal_product() -> None:
    assert 100 / 2 * 1.1 > 55
    assert capacity(100, 1, 2, 1.1) == 55
    assert capacity(13, 2, 5, 1.25) == 7  # 6.5
    assert capacity(1, 1, 8, 1.0) == 1
    assert capacity(16, 1, 8, 2) == 4


def test_later_tokens_displace_no_earlier_ones() -> None:
    chosen = choices(20, 4, 2, 5)
    keep_mask = within_capacity(chosen, 5, 1.0, 1)
    assert not keep_mask.all()
    for position in (1, 7, 19):
        changed = chosen.clone()
        changed[position:] = choices(20, 4, 2, 5, seed=9)[position:]
        assert torch.equal(within_capacity(changed, 5, 1.0, 1)[:position], keep_mask[:position])


def test_capacity_does_not_depend_on_other_groups() -> None:
    chosen = choices(11, 6, 2, 5)
    keep_mask = within_capacity(chosen, 5, 0.8, 2)
    for first in (0, 2, 4):
        one_group = within_capacity(chosen[:, first : first + 2], 5, 0.8, 2)
        assert torch.equal(one_group, keep_mask[:, first : first + 2])


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_losses_equal_their_formulas(samples: int) -> None:
    logits = random(S, B, E).requires_grad_()
    probabilities, chosen, _ = route(logits, RoutingOptions(2, "sigmoid"))
    balance, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for group in range(0, B, samples):
        batch = slice(group, group + samples)
        tokens = S * samples
        for e in range(E):
            f = (chosen[:, batch] == e).double().sum() / (2 * tokens)
            balance = balance + E * f * probabilities[:, batch, e].sum() / tokens
        z = z + logits[:, batch].exp().sum(-1).log().square().sum() / tokens
    ours = {"balance": balance_loss(probabilities, chosen, samples)}
    ours["z"] = router_z_loss(logits, samples)
    theirs = {"balance": balance, "z": z}
    for losses in (ours, theirs):
        for name in ("balance", "z"):
            (losses[f"d_{name}"],) = torch.autograd.grad(losses[name], logits, retain_graph=True)
    detached = ({k: v.detach() for k, v in losses.items()} for losses in (ours, theirs))
    assert_equal(*detached, of_all=0)


def test_balance_loss_equals_deepseeks_sequence_wise_loss() -> None:
    """arXiv:2412.19437, eqs. 17 to 20, for each sequence, without α; the same as Megatron's.

    Its shares count the best k by score only, without the bias and groups of the choice.
    """
    k = 3
    logits, bias = random(S, B, E), random(E)
    s = logits.sigmoid()
    f = torch.zeros(B, E, dtype=torch.float64)
    for t in range(S):
        for b in range(B):
            for i in s[t, b].argsort(descending=True)[:k].tolist():
                f[b, i] += E / (k * S)
    P = (s / s.sum(-1, keepdim=True)).mean(0)
    options = RoutingOptions(k, "sigmoid", groups=2, top_groups=1)
    probabilities, chosen, _ = route(logits, options, bias)
    got = balance_loss(probabilities, best_experts(probabilities, k), 1)
    assert_equal({"loss": got}, {"loss": (f * P).sum()}, of_all=0)
    assert (balance_loss(probabilities, chosen, 1) - got).abs() > 1e-3  # the choices differ

    from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss

    counted, scores = compute_routing_scores_for_aux_loss(logits.flatten(0, 1), k, "sigmoid")
    shares = counted.double().view(S, B, E).sum(0) * E / (k * S)
    assert_equal({"loss": got}, {"loss": (shares * scores.view(S, B, E).mean(0)).sum()}, of_all=0)


def test_loads_count_kept_choices() -> None:
    chosen = choices(9, 4, 2, 5)
    keep_mask = within_capacity(chosen, 6, 0.7, 2)
    assert loads(chosen, None, 6).tolist() == [int((chosen == e).sum()) for e in range(6)]
    assert loads(chosen, keep_mask, 6).tolist() == [
        int(((chosen == e) & keep_mask).sum()) for e in range(6)
    ]
    assert loads(chosen, keep_mask, 6).sum() < loads(chosen, None, 6).sum() == chosen.numel()
    assert loads(chosen, keep_mask, 6)[5] == 0
