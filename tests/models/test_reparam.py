"""Transforms of weights at use: σReparam, centred streams, conversion from LayerNorm, muP."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import decoder, gradients
from shown import Row
from small import config_of, context, data, model_of
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from colonnade.launcher.convert.recentre import to_crms, to_pre_rms
from colonnade.launcher.recipe.tables import OptimizerConfig
from colonnade.models.blocks.attention import score_scale
from colonnade.models.blocks.base import SubBlock
from colonnade.models.cards.base import gains
from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule, declared
from colonnade.models.parameters import ParameterSpec, normal
from colonnade.models.reparam import spectral
from colonnade.models.wiring import State
from colonnade.parallel.materialise import load_decoder, materialise, new_decoder
from colonnade.parallel.optimizer import AdamW
from colonnade.parallel.recompute import recompute as recompute_model

TABLE = [
    Row("any row", "σReparam", "torch's spectral_norm, step by step"),
    Row("any row", "Pre-RMSNorm; CRMSNorm (weights converted)", "LayerNorm"),
    Row("any row", "muP at its base width", "the plain model", "bits"),
]

# σReparam


class Reparametrised(ParameterModule):
    """A module with one linear weight under σReparam."""

    def __init__(self, *shape: int) -> None:
        weight = ParameterSpec("w", shape, normal(1.0), "reads")
        super().__init__([weight, *gains(weight)])
        spectral(self)
        self.double()


def test_sigma_reparam_is_torch_spectral_norm() -> None:
    """Values, gradients and power iteration are equal over several steps from the same state."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=g, dtype=torch.float64)
    theirs = spectral_norm(nn.Linear(5, 7, bias=False, dtype=torch.float64), eps=0.0)
    state = theirs.parametrizations.weight[0]
    ours = Reparametrised(7, 5)
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(weight)
        ours.w.copy_(weight)
        ours.w_gain.zero_()
        start = F.normalize(torch.randn(12, generator=g, dtype=torch.float64), dim=0)
        state._u.copy_(F.normalize(start[:7], dim=0))
        state._v.copy_(F.normalize(start[7:], dim=0))
        ours.w_left.copy_(state._u)
        ours.w_right.copy_(state._v)
    ours.started.add("w")
    for step in range(4):
        # Both update u (our left) from v (our right), then v from u.
        target = torch.randn(7, 5, generator=g, dtype=torch.float64)
        ours.due.add("w")
        used, second_use = ours.weight_of("w"), ours.weight_of("w")
        assert torch.equal(used, second_use)  # one iteration per step
        expected = theirs.weight
        assert_equal({f"W{step}": used.detach()}, {f"W{step}": expected.detach()})
        (one,) = torch.autograd.grad((used * target).sum(), ours.w)
        (two,) = torch.autograd.grad(
            (expected * target).sum(), theirs.parametrizations.weight.original
        )
        assert_equal({"dW": one}, {"dW": two})
        with torch.no_grad():
            ours.w += 0.1 * target
            theirs.parametrizations.weight.original += 0.1 * target


def test_sigma_reparam_starts_at_the_spectral_norm_per_expert() -> None:
    g = torch.Generator().manual_seed(1)
    module = Reparametrised(3, 6, 4)
    with torch.no_grad():
        module.w.copy_(torch.randn(3, 6, 4, generator=g))
        module.w_gain.copy_(torch.tensor([0.0, 1.0, 2.0]))
        module.w_left.zero_()
        module.w_right.zero_()
    norms = torch.linalg.matrix_norm(module.weight_of("w"), ord=2)
    assert (norms - torch.tensor([1.0, 2.0, 3.0])).abs().max() < 1e-3  # after INITIAL_ITERATIONS


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_sigma_reparam_under_recomputation(recompute: str) -> None:
    """The iteration advances once per step, and backward recomputes with the same weights."""
    tokens, labels = data(1)
    models = [model_of(config_of("*-ME", sigma_reparam=True), 2) for _ in range(2)]
    recompute_model(models[1], recompute)
    for _ in range(2):
        for model in models:
            model.zero_grad()
            model.begin_step()
            for _ in range(2):  # micro-batches
                model(tokens, context(), labels)[0].backward()
        assert_equal(gradients(models[1]), gradients(models[0]))
    states = [dict(model.named_buffers()) for model in models]
    assert states[0]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_a_small_change_of_gamma_is_seen_in_bf16() -> None:
    """γ is stored minus 1, so bf16's eight bits do not round a small change away."""
    module = Reparametrised(64, 64).float()
    module.local = lambda parameter: parameter.bfloat16()  # as FSDP casts it for the half
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        module.w.copy_(torch.randn(64, 64, generator=g))
        module.w_left.zero_()
        module.w_right.zero_()
        norms = []
        for gain in (0.0, 0.003):
            module.w_gain.fill_(gain)
            norms.append(module.weight_of("w").double().norm().item())
    assert norms[1] / norms[0] == pytest.approx(1.003, abs=5e-4)


# LayerNorm to RMSNorm on a centred stream

ROWS: list[tuple[str, dict[str, Any]]] = [
    ("*-M-", {"attention_bias": "all", "mlp_bias": True}),
    ("*EmGD", {"shared_ffn": 5}),
    ("*-", {"tied": True, "attention": "mla", "kv_rank": 7, "rope_dim": 4}),
    ("T-*-", {"residual": "ladder", "logit_cap": 3.0}),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("pattern", "fields"), ROWS)
def test_layer_norm_becomes_pre_rms(pattern: str, fields: dict[str, Any], bias: bool) -> None:
    config = config_of(pattern, norm="layer", norm_bias=bias, **fields)
    before = model_of(config, 3)
    made, weights = to_pre_rms(config, before.state_dict())
    after = decoder(made, weights)
    with torch.no_grad():
        tokens, _ = data(3)
        assert_equal({"logits": after(tokens, context())}, {"logits": before(tokens, context())})
        (written, _), _ = after.wiring.run(
            State(after.embedding(tokens, context().positions)), context()
        )
    assert written.mean(-1).abs().max() < 1e-12 * written.abs().max()


@pytest.mark.parametrize(("pattern", "fields"), ROWS)
def test_layer_norm_becomes_crms(pattern: str, fields: dict[str, Any]) -> None:
    config = config_of(pattern, norm="layer", **fields)
    before = model_of(config, 4)
    made, weights = to_crms(config, before.state_dict())
    assert made.hidden == config.hidden - 1
    after = decoder(made, weights)
    with torch.no_grad():
        tokens, _ = data(4)
        assert_equal({"logits": after(tokens, context())}, {"logits": before(tokens, context())})


def test_crms_sets_the_sizes_that_are_used() -> None:
    """Those of absent sub-blocks would be unused settings, and too small in a narrow model."""
    config = ModelConfig(pattern="*-", hidden=32, vocab=16, norm="layer")
    made, weights = to_crms(config, new_decoder(config).state_dict())
    assert (made.hidden, made.head_dim) == (31, 8)
    assert all(made.unused(field) is None for field in made.model_fields_set)
    load_decoder(made, weights)


def test_a_centred_stream_stays_centred_in_training() -> None:
    model = model_of(config_of("*-", norm="pre_rms"), 5)
    tokens, labels = data(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, context(), labels)[0].backward()
        optimizer.step()
    with torch.no_grad():
        (stream, _), _ = model.wiring.run(
            State(model.embedding(tokens, context().positions)), context()
        )
    assert stream.mean(-1).abs().max() < 1e-12 * stream.abs().max()


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("norm", {"norm": "rms"}),
        ("norm_position", {"norm_position": "after"}),
        ("norm_after", {"norm_after": "*"}),
        ("sigma_reparam", {"sigma_reparam": True}),
        ("norm_bias", {"norm_bias": True}),
        ("share", {"share": True, "repeat": 2}),
        ("mtp", {"mtp": 1}),
        ("attention_gate", {"attention_gate": "head"}),
        ("mup_base", {"mup_base": {"hidden": 6}}),
    ],
)
def test_what_crms_cannot_hold_is_refused(field: str, fields: dict[str, Any]) -> None:
    config = config_of("*-", **{"norm": "layer", **fields})
    with pytest.raises(ValueError, match=rf"model\.{field} = "):
        to_crms(config, model_of(config, 6).state_dict())


# muP


def test_mup_scales_the_bound_of_dt_once() -> None:
    """U(±1/√rank) in the base model; its bound shrinks only with the growth of the rank."""
    fields = {"mamba1_inner": 64, "init_std": 0.1}
    base = config_of("m", mamba1_rank=4, **fields)
    wide = config_of("m", mamba1_rank=64, mup_base={"mamba1_rank": 4, "mamba1_inner": 16}, **fields)
    bounds = [started(c).wiring.block(0).second.dt_b.abs().max().item() for c in (base, wide)]
    assert bounds == pytest.approx([4**-0.5, 64**-0.5], rel=0.02)


def sized(width: int, base: int | None, **fields: Any) -> ModelConfig:
    """Returns `*-EM` at some width; every width scales with it except that of a head."""

    def widths(n: int) -> dict[str, int]:
        return {"hidden": n, "ffn": 2 * n, "expert_ffn": n, "heads": n // 8, "mamba_heads": n // 4}

    mup = None if base is None else widths(base)
    return ModelConfig.model_validate(
        dict(
            pattern="*-EM", vocab=31, head_dim=8, mamba_head_dim=8, mamba_state=8, mamba_chunk=8,
            experts=4, init_std=0.1, mup_base=mup, **widths(width), **fields,
        )
    )  # fmt: skip


def started(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    materialise(model.double(), torch.device("cpu"), seed=0)
    return model


def test_mup_at_its_base_is_the_plain_model() -> None:
    tokens, labels = data(7)
    results = []
    for base in (None, 32):
        model = started(sized(32, base))
        model(tokens, context(), labels)[0].backward()
        groups = AdamW(model, OptimizerConfig()).torch.param_groups
        results.append((gradients(model), [(g["rate"], g["weight_decay"]) for g in groups]))
    (plain, plain_groups), (mup, mup_groups) = results
    assert all(torch.equal(plain[n], mup[n]) for n in plain)
    assert plain_groups == mup_groups


def test_mup_rules() -> None:
    """Rules of the table: hidden weights, the router (output-like), vectors, embedding, head."""
    r = 4.0
    plain, model = started(sized(128, None)), started(sized(128, 32))
    assert model.head.scale == 1 / r
    rates = {name: spec.rate for name, _, spec in declared(model)}
    before = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        ratio = (p / before[name]).median().item() if before[name].any() else 1.0
        role = name.rpartition(".")[2]
        hidden = name.startswith("blocks") and p.dim() > 1 and "conv" not in role
        hidden = hidden and not name.endswith("router") and role not in "BC"
        assert rates[name] == (1 / r if hidden else 1.0), name
        assert ratio == pytest.approx(r**-0.5 if hidden else 1.0, rel=1e-5), name
    router, wide_router = (m.wiring.block(2).small for m in (plain, model))
    used = wide_router.weight_of("router"), router.weight_of("router")
    assert_equal({"router": used[0]}, {"router": used[1] / r})
    # B and C of Mamba-2 do not grow: their input alone does
    used = (m.wiring.block(3).first.weight_of("B") for m in (model, plain))
    assert_equal({"B": next(used)}, {"B": next(used) / r})
    decay = {
        g["rate"]: g["weight_decay"]
        for g in AdamW(model, OptimizerConfig()).torch.param_groups
        if g["weight_decay"]
    }
    assert decay == {1.0: pytest.approx(0.1), 1 / r: pytest.approx(0.1 * r)}


def outputs(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """Returns the output of every sub-block, and the logits."""
    outputs_by_name: dict[str, Tensor] = {}

    def record(name: str, block: SubBlock) -> Any:
        return lambda module, args, output: outputs_by_name.update({name: block.receive(output)})

    blocks = cast("dict[str, SubBlock]", model.wiring.blocks).items()
    handles = [b.second.register_forward_hook(record(name, b)) for name, b in blocks]
    with torch.no_grad():
        outputs_by_name["logits"] = model(tokens, context())
    for handle in handles:
        handle.remove()
    return outputs_by_name


def growth(base: int | None) -> dict[str, float]:
    """Returns how each output's change after 5 Adam steps grows with width: log-log slopes."""
    widths = (32, 64, 128, 256)
    tokens, labels = data(8)
    sizes: dict[str, list[float]] = {}
    for width in widths:
        model = started(sized(width, base))
        optimizer = AdamW(model, OptimizerConfig())
        before = outputs(model, tokens)
        for _ in range(5):
            optimizer.zero_grad()
            (model(tokens, context(), labels)[0] / (labels != -100).sum()).backward()
            optimizer.step(0.02)
        for name, after in outputs(model, tokens).items():
            sizes.setdefault(name, []).append((after - before[name]).abs().mean().log().item())
    x = torch.tensor(widths, dtype=torch.float64).log()
    x = x - x.mean()
    slopes = {name: torch.tensor(y, dtype=torch.float64) @ x for name, y in sizes.items()}
    return {name: float(slope / x.square().sum()) for name, slope in slopes.items()}


def test_coordinates_do_not_grow_under_mup() -> None:
    """Coordinate check: outputs' changes grow with width without muP, and do not with it."""
    standard, mup = growth(None), growth(32)
    assert max(mup.values()) < 0.3, mup
    assert max(standard.values()) > 1.0, standard


def test_multipliers_are_those_of_the_base_model() -> None:
    fields = {"logit_multiplier": 2.0, "attention_multiplier": 0.3}
    of_base = {"hidden": 32, "head_dim": 8}
    base = config_of("*-", **of_base, **fields)
    wide = config_of("*-", hidden=128, head_dim=32, mup_base=of_base, **fields)
    assert score_scale(base) == 0.3
    assert score_scale(wide) == pytest.approx(0.3 / 4)
    assert model_of(wide, seed=0).head.scale == 2.0 / 4
