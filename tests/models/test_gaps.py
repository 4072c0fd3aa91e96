"""Properties that other tests assume: balancing, draws, state of a step, initial weights."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from small import B, S, V, config_of, context, data, model_of
from torch import Tensor

from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.stages import training_stages
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
from colonnade.models.wiring import skips_newest
from colonnade.parallel import engine
from colonnade.parallel.materialise import materialise
from colonnade.parallel.optimizer import AdamW
from colonnade.parallel.passes import Passes


def started(config: ModelConfig) -> Decoder:
    """Builds a model in fp64 with initial weights."""
    with torch.device("meta"):
        model = Decoder(config)
    materialise(model.double(), torch.device("cpu"), seed=0)
    return model


def unit_rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def output(model: Decoder, x: Tensor) -> Tensor:
    """Computes the first sub-block's output from its normed input `[S', B, D]`."""
    block, positions = model.wiring.block(0), torch.arange(len(x))[:, None].expand(-1, B)
    context = Context(positions).at(0)
    return block(x, context)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def routed(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first sub-block's input, probabilities and choices, each `[B, S, ...]`."""
    weights = dict(model.named_parameters())
    x = unit_rms(weights["embedding.weight"][tokens.T], weights["norms.0.weight"])
    p = (x @ weights["blocks.0.router"].T).softmax(-1)
    return x, p, p.topk(model.config.top_k).indices


@pytest.mark.parametrize(("samples", "bias"), [(1, False), (2, False), (1, True)])
def test_sequence_loss_is_of_each_sample(samples: int, bias: bool) -> None:
    """It is the mean over samples of E · Σ f P, in value and gradient, whatever the balance groups.

    It counts the best experts by score, which the bias on choices does not change.
    """
    fields = {"balance_sequence": 0.3, "balance_samples": samples, "router_bias": bias}
    model = model_of(config_of("E", **fields), 1)
    for name, state in model.named_buffers():
        state.copy_(torch.linspace(0.5, -0.5, 5))
        assert name.endswith("bias")
    tokens, labels = data(1)
    objective, report = model(tokens, context(groups=B / samples), labels)
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
    """Tokens choose in order, sample by sample, until an expert's capacity is used up."""
    config = config_of("E", capacity=0.5, balance_samples=samples, router_normalise=False)
    model, (tokens, _) = model_of(config, 2), data(2)
    with torch.no_grad():
        x, p, chosen = routed(model, tokens)
        expected = torch.zeros_like(x)
        w = dict(model.wiring.block(0).experts.named_parameters())
        limit = -(-S * samples * 2 // (2 * 5))  # half of an even share, rounded up
        for b, s, k in itertools.product(range(B), range(S), range(2)):
            if (s, k) == (0, 0) and b % samples == 0:
                taken = [0] * 5
            e = int(chosen[b, s, k])
            taken[e] += 1
            if taken[e] <= limit:
                inner = F.silu(w["gate"][e] @ x[b, s]) * (w["up"][e] @ x[b, s])
                expected[b, s] += p[b, s, e] * (w["down"][e] @ inner)
    assert max(taken) > limit  # some are dropped
    out = output(model, x.transpose(0, 1))
    assert_equal({"out": out.detach()}, {"out": expected.transpose(0, 1)})


def test_router_noise_is_a_function_of_step_index_sample_and_token() -> None:
    records = CARDS["E"].records(config_of("E", experts=8), 1.0)
    router = Router(of_half(records, "small"), 0.3).double()
    x = torch.zeros(200, 3, 12, dtype=torch.float64)

    def noise(samples: list[int], key: int = 0, index: int = 0) -> Tensor:
        keys = Context(x[..., 0].long(), samples=torch.tensor(samples), rng_key=key).at(index)
        with torch.no_grad():
            router.router.zero_()
        return router(x[:, : len(samples)], keys).detach()

    drawn = noise([4, 7, 9])
    assert drawn.unique().numel() > 0.99 * drawn.numel()
    assert drawn.std().item() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(noise([7]), drawn[:, 1:2])  # whatever other samples are in the batch
    for other in (noise([4, 7, 9], key=1), noise([4, 7, 9], index=1)):
        assert (other == drawn).double().mean() < 0.01
    assert not router.eval()(x, context()).any()


def test_router_bias_follows_the_load_of_all_uses_of_a_sub_block() -> None:
    """It rises by the rate where the load, summed over all uses, is below the mean of experts."""
    shared = dict(repeat=2, share=True, experts=3)
    model = model_of(config_of("*E", router_bias=True, router_bias_rate=0.25, **shared), 3)
    block = model.wiring.block(1)
    model.end_step({1: torch.tensor([9, 1, 2]), 3: torch.tensor([0, 8, 4])})  # 9, 9, 6
    assert block.small.router_bias.tolist() == [-0.25, -0.25, 0.25]
    model.end_step({1: torch.tensor([4, 5, 3]), 3: torch.tensor([4, 0, 8])})  # 8, 5, 11
    assert block.small.router_bias.tolist() == [-0.25, 0.0, 0.0]


def test_every_sub_block_has_its_own_index() -> None:
    """Draws, losses and loads are keyed by index, including those of MTP modules."""
    model = model_of(config_of("*E", mtp=2, mtp_pattern="E-E", balance=0.1), 4)
    tokens, labels = data(4)
    _, report = model(tokens, context(), labels)
    assert sorted(report.loads) == sorted(report.terms) == [1, 2, 4, 5, 7]


def test_two_passes_balance_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """If both passes draw the same experts, every balancing loss is that of a single pass."""
    monkeypatch.setattr(thor, "draw_integers", lambda n, *keys: torch.zeros_like(keys[-1]))
    model, (tokens, labels) = model_of(config_of("TE", balance=0.2, router_z=0.1), 5), data(5)
    _, two_passes = model(tokens, context(groups=2.0), labels)
    _, one_pass = model.wiring(model.embedding(tokens, context().positions), context(groups=2.0))
    assert_equal({"term": two_passes.terms[1]}, {"term": one_pass.terms[1]})


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
    """The output of the first token, whose state is S = β v kᵀ, with β up to 1 or 2."""
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


def test_only_channel_mixers_after_a_sequence_mixer_are_parallel() -> None:
    row = "-*--E*TM-"
    skips = skips_newest(config_of(row, residual="parallel"), row)
    assert [t for t, skipped in enumerate(skips) if skipped] == [2, 6, 8]


EVERY = dict(
    activation="polynorm", mtp=1, mtp_pattern="*E", attention_gate="head", attention_conv=3,
    hidden=24, sinks=True, position_temperature=True, qk_norm="head", shared_ffn=5,
    router_bias=True,
)  # fmt: skip


# Tables `[C, N]` of state spaces, which are multiplied with no activation; A has no weight decay.
RATES = ("A_log", "A_real_log", "A_imag")
TABLES = (*RATES, "C_real", "C_imag")


@pytest.mark.parametrize("fields", [EVERY, {"attention": "mla", "q_rank": 5, "rope_dim": 4}])
def test_sigma_reparam_is_of_every_linear_weight(fields: dict[str, Any]) -> None:
    """Every matrix that multiplies activations in a sub-block has spectral norm γ, no other has."""
    model = model_of(config_of("*MmSDGE-T", sigma_reparam=True, **fields), 8)
    errors = {}
    for wiring in model.wirings():
        for module in (m for m in wiring.modules() if isinstance(m, ParameterModule)):
            for name, p in module.named_parameters(recurse=False):
                matrix = p.dim() > 1 and "conv" not in name and name not in (*TABLES, "gate_w")
                if matrix:
                    gain = 1 + getattr(module, f"{name}_gain")
                    norm = torch.linalg.matrix_norm(module.weight_of(name), ord=2)
                    errors[name] = (norm / gain.abs().view(norm.shape) - 1).abs().max().item()
                else:
                    assert torch.equal(module.weight_of(name), p), name
    assert max(errors.values()) < 0.02, errors  # after 64 power iterations


def test_singular_vectors_advance_once_a_step_and_only_in_training() -> None:
    model, (tokens, labels) = model_of(config_of("-", sigma_reparam=True), 9), data(9)
    half = model.wiring.block(0).first
    model(tokens, context(), labels)[0].backward()  # the first use initialises them

    def state() -> tuple[Tensor, Tensor]:
        return half.up_left.clone(), half.up_right.clone()

    with torch.no_grad():
        half.up.copy_(normal(9, 11, 12))
    before = state()
    model(tokens, context(), labels)[0].backward()  # begin_step was not called
    model.begin_step()
    model.eval()(tokens, context(), labels)
    model.train()
    assert all(map(torch.equal, state(), before))
    for _ in range(2):
        model(tokens, context(), labels)[0].backward()
    left = F.normalize(half.up.detach() @ before[1], dim=0)
    right = F.normalize(half.up.detach().T @ left, dim=0)
    assert_equal(dict(zip("lr", state(), strict=True)), {"l": left, "r": right})


@pytest.mark.parametrize("kind", [{}, {"attention": "mla", "rope_dim": 4, "q_rank": 5}])
def test_mup_scores_and_zero_start(kind: dict[str, Any]) -> None:
    """Scores scale with 1/width instead of 1/√width; queries and the head may start at 0."""
    base = {"hidden": 12, "head_dim": 4}
    config = config_of("*", hidden=48, **kind, mup_base=base, mup_zero_init=True)
    config = config.model_copy(update={"head_dim": 16})
    rope = 4 if kind else 0
    assert score_scale(config) == pytest.approx((4 + rope) ** 0.5 / (16 + rope))
    zeros = {n for n, p in started(config).named_parameters() if not p.any()}
    assert zeros == {"head.weight", f"blocks.0.{'q_b' if kind else 'q'}"}


class Steps:
    """Runs training steps of a recipe in this process, without process groups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: int = 1, **fields: Any) -> None:
        monkeypatch.setattr(engine.dist, "all_reduce", lambda *a, **k: None)
        monkeypatch.setattr(engine, "ranks_per_sample", lambda mesh: 1)
        monkeypatch.setattr(engine, "ranks_per_loss", lambda mesh: 1)
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
        mesh: Any = None  # on one rank nothing reads it
        one = engine.Engine(self.model, self.optimizer, mesh, cpu, Passes(self.model, cpu))
        return train_step(one, batches, rows, training_stages(self.recipe)[0], number).report


@pytest.mark.parametrize("samples", [1, 2])
def test_figures_of_a_step(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """The loss is the mean NLL per valid token; balance is the mean over balance groups."""
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
    """Router biases change by their rate; singular vectors follow changed weights."""
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
    model = model_of(config_of("*MmSDGE-T", sigma_reparam=True, norm="layer", **EVERY), 10)
    optimizer = AdamW(model, OptimizerConfig(weight_decay=0.3))
    groups = optimizer.torch.param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        primer = "blocks.0.conv_" in name  # starts as the identity
        plain = p.dim() < 2 or name.endswith(RATES) or primer
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
    weights = {n.removeprefix("blocks."): p.detach() for n, p in model.named_parameters()}
    tap = F.one_hot(torch.tensor(2), 3).double()
    assert all((weights[f"0.conv_{n}"] == tap).all() for n in "qkv")
    assert (weights["0.growth"] == 1.5).all()
    assert not weights["0.sinks"].any()
    assert (weights["1.A_log"] - torch.arange(1, 5).double().log()).abs().max() < 1e-6
    bound = weights["1.dt_b"].abs().max().item()
    assert 0.8 * 3**-0.5 < bound <= 3**-0.5 + 1e-6
    for name in ("1.dt_bias", "2.dt_bias"):
        dt = F.softplus(weights[name])
        assert dt.min() > 0.00099
        assert dt.max() < 0.1001
    assert (weights["2.A_log"].exp() - 8.005).abs().max() < 7.996
    poly = torch.tensor([0, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    assert (weights["3.poly"] - poly).abs().max() < 1e-7
    assert all((p == 0).all() for n, p in weights.items() if n.endswith("_gain"))
