"""What other tests take on trust: balancing, draws, states of a step, first weights, costs."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from small import B, S, V, config_of, context, data, model_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.tables import OptimizerConfig, Recipe, TrainConfig
from colonnade.launcher.train.step import train_step
from colonnade.models.blocks import thor
from colonnade.models.blocks.attention import score_scale
from colonnade.models.blocks.mixture import Router
from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import of_half
from colonnade.models.shapes import measure
from colonnade.models.wiring import skips_newest
from colonnade.parallel import engine
from colonnade.parallel.materialise import materialise
from colonnade.parallel.optimizer import AdamW


def started(config: ModelConfig) -> Decoder:
    """In fp64, with first weights."""
    with torch.device("meta"):
        model = Decoder(config)
    materialise(model.double(), torch.device("cpu"), seed=0)
    return model


def unit_rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def output(model: Decoder, x: Tensor) -> Tensor:
    """The first sub-block's, for its normed input `[S', B, D]`."""
    block, here = model.wiring.block(0), Context(torch.arange(len(x))[:, None].expand(-1, B)).at(0)
    return block.finish(block.begin(x, here), here)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def routed(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first sub-block's input, its probabilities and its choices, each by sample."""
    weights = dict(model.named_parameters())
    x = unit_rms(weights["embedding.weight"][tokens.T], weights["norms.0.weight"])
    p = (x @ weights["blocks.0.router"].T).softmax(-1)
    return x, p, p.topk(model.config.top_k).indices


@pytest.mark.parametrize(("samples", "bias"), [(1, False), (2, False), (1, True)])
def test_sequence_loss_is_of_each_sample(samples: int, bias: bool) -> None:
    """The mean over samples of E · Σ f P, in value and gradient, whatever the balance groups.

    A bias that steers the choices does not alter what it counts: the best by score.
    """
    fields = {"balance_sequence": 0.3, "balance_samples": samples, "router_bias": bias}
    model = model_of(config_of("E", **fields), 1)
    for name, state in model.named_buffers():
        state.copy_(torch.linspace(0.5, -0.5, 5))
        assert name.endswith("bias")
    tokens, labels = data(1)
    here = context(groups=B / samples)
    objective, report = model(tokens, here, labels)
    (objective * 0).backward()
    router = model.wiring.block(0).small.router
    assert router.grad is not None
    gradient = router.grad.clone()
    model.zero_grad()
    _, p, chosen = routed(model, tokens)
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for e in range(5):
            loss = loss + 0.3 / B * 5 * (chosen[b] == e).double().mean() * p[b, :, e].mean()
    loss.backward()
    assert_equal(
        {"loss": report.terms[0], "grad": gradient}, {"loss": loss.detach(), "grad": router.grad}
    )


@pytest.mark.parametrize("samples", [1, 2])
def test_capacity_is_of_a_balance_group(samples: int) -> None:
    """Tokens choose one after the other, sample by sample, until an expert's places are taken."""
    config = config_of("E", capacity=0.5, balance_samples=samples, router_normalise=False)
    model, (tokens, _) = model_of(config, 2), data(2)
    with torch.no_grad():
        x, p, chosen = routed(model, tokens)
        expected = torch.zeros_like(x)
        w = dict(model.wiring.block(0).second.named_parameters())
        places = -(-S * samples * 2 // (2 * 5))  # half of an even share, rounded up
        for b, s, k in itertools.product(range(B), range(S), range(2)):
            if (s, k) == (0, 0) and b % samples == 0:
                taken = [0] * 5
            e = int(chosen[b, s, k])
            taken[e] += 1
            if taken[e] <= places:
                inner = F.silu(w["gate"][e] @ x[b, s]) * (w["up"][e] @ x[b, s])
                expected[b, s] += p[b, s, e] * (w["down"][e] @ inner)
    assert max(taken) > places  # some are dropped
    out = output(model, x.transpose(0, 1))
    assert_equal({"out": out.detach()}, {"out": expected.transpose(0, 1)})


def test_router_noise_is_a_function_of_step_place_sample_and_token() -> None:
    records = CARDS["E"].records(config_of("E", experts=8), 1.0)
    router = Router(of_half(records, "small"), 0.3).double()
    x = torch.zeros(200, 3, 12, dtype=torch.float64)

    def noise(samples: list[int], key: int = 0, index: int = 0) -> Tensor:
        here = Context(x[..., 0].long(), samples=torch.tensor(samples), rng_key=key).at(index)
        with torch.no_grad():
            router.router.zero_()
        return router(x[:, : len(samples)], here).detach()

    drawn = noise([4, 7, 9])
    assert drawn.unique().numel() > 0.99 * drawn.numel()
    assert drawn.std().item() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(noise([7]), drawn[:, 1:2])  # in whatever company
    for other in (noise([4, 7, 9], key=1), noise([4, 7, 9], index=1)):
        assert (other == drawn).double().mean() < 0.01
    assert not router.eval()(x, context()).any()


def test_the_bias_is_steered_by_all_uses_of_a_sub_block() -> None:
    """Up by the rate where the load, summed over all uses, is below the mean over experts."""
    shared = dict(repeat=2, share=True, experts=3)
    model = model_of(config_of("*E", router_bias=True, router_bias_rate=0.25, **shared), 3)
    block = model.wiring.block(1)
    model.end_step({1: torch.tensor([9, 1, 2]), 3: torch.tensor([0, 8, 4])})  # 9, 9, 6
    assert block.small.router_bias.tolist() == [-0.25, -0.25, 0.25]
    model.end_step({1: torch.tensor([4, 5, 3]), 3: torch.tensor([4, 0, 8])})  # 8, 5, 11
    assert block.small.router_bias.tolist() == [-0.25, 0.0, 0.0]


def test_every_sub_block_has_a_place_of_its_own() -> None:
    """Draws, losses and loads are by place, those of further tokens' modules included."""
    model = model_of(config_of("*E", mtp=2, mtp_pattern="E-E", balance=0.1), 4)
    tokens, labels = data(4)
    _, report = model(tokens, context(), labels)
    assert sorted(report.loads) == sorted(report.terms) == [1, 2, 4, 5, 7]


def test_two_passes_balance_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same experts drawn in both passes, every balancing term is that of a single one."""
    monkeypatch.setattr(thor, "draw_integers", lambda n, *keys: torch.zeros_like(keys[-1]))
    model, (tokens, labels) = model_of(config_of("TE", balance=0.2, router_z=0.1), 5), data(5)
    _, twice = model(tokens, context(groups=2.0), labels)
    _, once = model.wiring(model.embedding(tokens), context(groups=2.0))
    assert_equal({"term": twice.terms[1]}, {"term": once.terms[1]})


def test_sinks_and_soft_capping_reach_the_scores() -> None:
    config = config_of("*", positions="none", sinks=True, attention_cap=1.5, heads=1, hidden=6)
    model = model_of(config, 6)
    w = dict(model.wiring.block(0).named_parameters())
    x = normal(6, S, B, 6)
    q, k, v = (x @ w[name].T for name in "qkv")
    scores = 1.5 * torch.tanh(torch.einsum("sbd,tbd->bst", q, k) / 6**0.5 / 1.5)
    e = scores.exp().tril()
    out = torch.einsum("bst,tbd->sbd", e / (e.sum(-1, keepdim=True) + w["sinks"].exp()), v)
    expected = out @ w["out"].T
    assert_equal({"out": output(model, x).detach()}, {"out": expected.detach()})


@pytest.mark.parametrize("negative", [False, True])
def test_strength_of_the_delta_rule(negative: bool) -> None:
    """The first token's output, S = β v kᵀ, with β up to 1 or 2."""
    model = model_of(config_of("D", delta_negative=negative, delta_key_heads=4), 7)
    w = dict(model.wiring.block(0).named_parameters())
    x = normal(7, 1, B, 12)

    def first(name: str) -> Tensor:
        y = F.silu(x[0] @ w[name].T * w[f"conv_{name}"][:, -1])
        return y.view(B, 4, -1)

    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in map(first, "qk"))
    beta = (x[0] @ w["beta"].T).sigmoid() * (2 if negative else 1)
    o = (beta * (q * k).sum(-1) * 3**-0.5)[..., None] * first("v")
    expected = unit_rms(o, w["norm"]).flatten(1) @ w["out"].T
    assert_equal({"out": output(model, x)[0].detach()}, {"out": expected.detach()})


def test_channel_mixers_stand_beside_a_sequence_mixer_alone() -> None:
    row = "-*--E*TM-"
    skips = skips_newest(config_of(row, residual="parallel"), row)
    assert [t for t, skipped in enumerate(skips) if skipped] == [2, 6, 8]


EVERY = dict(
    activation="polynorm", mtp=1, mtp_pattern="*E", attention_gate="head", attention_conv=3,
    hidden=24, sinks=True, position_temperature=True, qk_norm="head", shared_ffn=5,
    router_bias=True,
)  # fmt: skip


@pytest.mark.parametrize("fields", [EVERY, {"attention": "mla", "q_rank": 5, "rope_dim": 4}])
def test_sigma_reparam_is_of_every_linear_weight(fields: dict[str, Any]) -> None:
    """In sub-blocks: whatever is multiplied with activations has the norm γ, and nothing else."""
    model = model_of(config_of("*MmDGE-T", sigma_reparam=True, **fields), 8)
    found = {}
    for wiring in model.wirings():
        for part in (p for p in wiring.modules() if isinstance(p, ParameterModule)):
            for name, p in part.named_parameters(recurse=False):
                matrix = p.dim() > 1 and "conv" not in name and name not in ("A_log", "gate_w")
                if matrix:
                    gain = getattr(part, f"{name}_gain")
                    norm = torch.linalg.matrix_norm(part.weight_of(name), ord=2)
                    found[name] = (norm / (1 + gain).abs().view(norm.shape) - 1).abs().max().item()
                else:
                    assert torch.equal(part.weight_of(name), p), name
    assert max(found.values()) < 0.02, found  # power iteration, 64 times


def test_singular_vectors_advance_once_a_step_and_in_training_alone() -> None:
    model, (tokens, labels) = model_of(config_of("-", sigma_reparam=True), 9), data(9)
    part = model.wiring.block(0).first
    model(tokens, context(), labels)[0].backward()  # the first use starts them

    def state() -> tuple[Tensor, Tensor]:
        return part.up_left.clone(), part.up_right.clone()

    with torch.no_grad():
        part.up.copy_(normal(9, 11, 12))
    before = state()
    model(tokens, context(), labels)[0].backward()  # no step began
    model.begin_step()
    model.eval()(tokens, context(), labels)
    model.train()
    assert all(map(torch.equal, state(), before))
    for _ in range(2):
        model(tokens, context(), labels)[0].backward()
    left = F.normalize(part.up.detach() @ before[1], dim=0)
    right = F.normalize(part.up.detach().T @ left, dim=0)
    assert_equal(dict(zip("lr", state(), strict=True)), {"l": left, "r": right})


@pytest.mark.parametrize("kind", [{}, {"attention": "mla", "rope_dim": 4, "q_rank": 5}])
def test_mup_scores_and_zero_start(kind: dict[str, Any]) -> None:
    """Scores fall with the width, not its root; queries and the head may start at 0."""
    base = {"hidden": 12, "head_dim": 4}
    config = config_of("*", hidden=48, **kind, mup_base=base, mup_zero_init=True)
    config = config.model_copy(update={"head_dim": 16})
    rope = 4 if kind else 0
    assert score_scale(config) == pytest.approx((4 + rope) ** 0.5 / (16 + rope))
    zeros = {n for n, p in started(config).named_parameters() if not p.any()}
    assert zeros == {"head.weight", f"blocks.0.{'q_b' if kind else 'q'}"}


class Steps:
    """Steps of a recipe in this process, which is all there is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: int = 1, **fields: Any) -> None:
        monkeypatch.setattr(engine.dist, "all_reduce", lambda *a, **k: None)
        monkeypatch.setattr(engine, "ranks_per_sample", lambda mesh: 1)
        monkeypatch.setattr(engine, "ranks_per_token", lambda mesh: 1)
        monkeypatch.setattr(engine, "complete_gradients", lambda model, mesh: None)
        self.recipe = Recipe(
            model=config_of(fields.pop("pattern"), balance_samples=samples, **fields),
            train=TrainConfig(global_batch=4, micro_batch=2, seq_len=S, steps=100),
            optimizer=OptimizerConfig(lr=1e-30, schedule="constant", clip=0, weight_decay=0),
        )
        self.model = started(self.recipe.model)
        self.optimizer = AdamW(self.model, self.recipe.optimizer)

    def batch(self, samples: list[int]) -> Batch:
        g = torch.Generator().manual_seed(samples[0])
        tokens, labels = torch.randint(V, (2, 2, S), generator=g)
        labels = labels.where(torch.rand(2, S, generator=g) > 0.2, -100)
        return Batch(tokens, labels, torch.arange(S).expand(2, S), torch.zeros(2, S).long())

    def __call__(self, number: int) -> engine.Report:
        rows = [[0, 1], [2, 3]]
        batches, cpu = [self.batch(samples) for samples in rows], torch.device("cpu")
        mesh: Any = None  # one rank: nothing asks it
        one = engine.Engine(self.model, self.optimizer, mesh, cpu)
        return train_step(one, batches, rows, self.recipe, number).report


@pytest.mark.parametrize("samples", [1, 2])
def test_figures_of_a_step(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """The loss is the mean NLL per valid token alone; balance the mean over balance groups."""
    fields: dict[str, Any] = {"mtp": 1, "mtp_pattern": "-", "logit_z": 0.1, "router_z": 0.1}
    steps = Steps(monkeypatch, samples, pattern="*E", balance=0.3, **fields)
    nll, valid, term = 0.0, 0, 0.0
    for first in (0, 2):
        batch = steps.batch([first])
        tokens, labels = batch.tokens.T, batch.labels.T
        with torch.no_grad():
            logits = steps.model(tokens, context())
        flat = logits.flatten(0, 1), labels.flatten()
        nll += F.cross_entropy(*flat, reduction="sum").item()
        valid += int((labels != -100).sum())
        _, report = steps.model(tokens, context(groups=1.0), labels)
        term += float(report.terms[1]) / (4 / samples)
    result = steps(0)
    assert result.tokens == valid
    assert result.loss == pytest.approx(nll / valid, rel=1e-9)
    assert result.balance == pytest.approx(term, rel=1e-9)
    assert result.extras.keys() == {"logit_z", "mtp"}


def test_draws_change_with_the_step_and_repeat_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields in ({"pattern": "E", "router_noise": 1.0}, {"pattern": "T"}):
        steps = Steps(monkeypatch, init_std=0.5, **fields)
        losses = [steps(number).loss for number in (0, 1, 2, 1)]
        assert len(set(losses)) == 3, fields
        assert losses[1] == losses[3]


def test_a_step_advances_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of routers go up or down by their rate; singular vectors follow changed weights."""
    steps = Steps(monkeypatch, pattern="E-", sigma_reparam=True, router_bias=True)
    for number in (0, 1):
        before = {n: b.clone() for n, b in steps.model.named_buffers()}
        steps(number)
        with torch.no_grad():
            for p in steps.model.parameters():
                p += 0.1 * torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p)
        after = dict(steps.model.named_buffers())
        assert all(not torch.equal(after[n], before[n]) for n in before), "a state stood still"
        moved = after["blocks.0.router_bias"] - before["blocks.0.router_bias"]
        assert ((moved.abs() * 1e3 - 1).abs() < 1e-6).sum() > 2


def test_decay_and_rates_of_the_groups() -> None:
    """Matrices and filters decay; vectors, decay rates and gains do not."""
    model = model_of(config_of("*MmDGE-T", sigma_reparam=True, norm="layer", **EVERY), 10)
    optimizer = AdamW(model, OptimizerConfig(weight_decay=0.3))
    groups = optimizer.torch.param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        primer = "blocks.0.conv_" in name  # starts as the identity
        plain = p.dim() < 2 or name.endswith("A_log") or primer
        assert decay.pop(id(p)) == (0.0 if plain else 0.3), name
    assert not decay
    wide = started(config_of("-", hidden=24, ffn=22, mup_base={"hidden": 12, "ffn": 11}))
    optimizer = AdamW(wide, OptimizerConfig())
    optimizer.step(0.2)
    rates = {id(p): g["lr"] for g in optimizer.torch.param_groups for p in g["params"]}
    for name, p in wide.named_parameters():
        assert rates[id(p)] == pytest.approx(0.1 if "blocks" in name else 0.2), name


def test_first_weights_of_the_other_parameters() -> None:
    model = started(config_of("*mGE", sigma_reparam=True, **EVERY))
    found = {n.removeprefix("blocks."): p.detach() for n, p in model.named_parameters()}
    tap = F.one_hot(torch.tensor(2), 3).double()
    assert all((found[f"0.conv_{n}"] == tap).all() for n in "qkv")
    assert (found["0.growth"] == 1.5).all()
    assert not found["0.sinks"].any()
    assert (found["1.A_log"] - torch.arange(1, 5).double().log()).abs().max() < 1e-6
    bound = found["1.dt_b"].abs().max().item()
    assert 0.8 * 3**-0.5 < bound <= 3**-0.5 + 1e-6
    for name in ("1.dt_bias", "2.dt_bias"):
        dt = F.softplus(found[name])
        assert dt.min() > 0.00099
        assert dt.max() < 0.1001
    assert (found["2.A_log"].exp() - 8.005).abs().max() < 7.996
    poly = torch.tensor([0, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    assert (found["3.poly"] - poly).abs().max() < 1e-7
    assert all((p == 0).all() for n, p in found.items() if n.endswith("_gain"))


COSTS: list[tuple[str, dict[str, Any]]] = [
    ("--", {}),
    ("E-", {"shared_ffn": 4, "activation": "relu"}),
    ("T-", {}),
    ("-E", {"repeat": 3, "share": True}),
    ("-", {"mtp": 2, "mtp_pattern": "-E", "tied": True}),
    ("T", {"mtp": 1, "mtp_pattern": "T"}),
]


@pytest.mark.parametrize(("pattern", "fields"), COSTS)
def test_flops_are_those_of_the_products(pattern: str, fields: dict[str, Any]) -> None:
    """Products are counted as they run, forward and backward; vectors cost 2 an element."""
    model, (tokens, labels) = model_of(config_of(pattern, **fields), 11), data(11)
    with FlopCounterMode(display=False) as counter:
        model(tokens, context(), labels)[0].backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    passes = 2 if model.config.has("T") else 1
    products = measure(model.config, S).flops_per_token - 6 * passes * vectors
    assert counter.get_total_flops() == products * S * B
    assert measure(model.config, S).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("window", [None, 100, 1000])
def test_flops_of_attention_are_those_of_the_keys_seen(window: int | None) -> None:
    length = 500
    keys = sum(min(i + 1, window or length) for i in range(length)) / length
    for fields, width in ({}, 6 + 6), ({"attention": "mla", "rope_dim": 4, "value_dim": 8}, 10 + 8):
        config = config_of("*", window=window, **fields)
        expected = 2 * keys * 4 * width
        assert CARDS["*"].mixing_flops(config, length, 0) == pytest.approx(expected, rel=0.01)
