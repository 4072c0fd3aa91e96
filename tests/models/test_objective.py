"""What is minimised: z-loss and capped logits, further tokens (MTP), THOR's two passes, WideNet."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import gradients
from shown import Row
from small import B, S, config_of, context, data, model_of
from torch import Tensor, nn

from colonnade.models.blocks import thor
from colonnade.models.config import CARDS
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.names import canonical
from colonnade.parallel.engine import evaluating

TABLE = [
    Row("any row", "z-loss on logits; soft-capping", "their formulas"),
    Row("any row", "further tokens (MTP), packed or not", "its formula, token by token"),
    Row("T", "two passes with draws of their own, consistency loss", "dense models of the experts"),
    Row("*EM", "shared depth (WideNet); ladder", "an unshared model with tied weights"),
]


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over valid labels."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def compare(model: Decoder, objective: Tensor, expected: Tensor) -> None:
    """Both values, and the gradients of all parameters."""
    assert_equal({"objective": objective.detach()}, {"objective": expected.detach()})
    objective.backward()
    ours = gradients(model)
    model.zero_grad()
    expected.backward()
    assert_equal(ours, gradients(model))


@pytest.mark.parametrize(("cap", "z"), [(None, 0.1), (2.0, 0.0), (2.0, 0.1)])
def test_z_loss_and_soft_capping(cap: float | None, z: float) -> None:
    model = model_of(config_of("*-", logit_cap=cap, logit_z=z), 1)
    plain = model_of(config_of("*-"), 1)
    tokens, labels = data(1)
    objective, report = model(tokens, context(), labels)
    logits = plain(tokens, context())
    if cap:
        logits = cap * torch.tanh(logits / cap)
    valid = labels != -100
    term = z * logits.logsumexp(-1)[valid].square().sum()
    objective.backward()
    (nll(logits, labels) + term).backward()
    assert_equal(gradients(model), gradients(plain))
    assert_equal({"z": report.extras.get("logit_z", torch.zeros(()))}, {"z": term.detach()})
    with evaluating(model):
        assert_equal({"logits": model(tokens, context())}, {"logits": logits})
        alone, _ = model(tokens, context(), labels)  # evaluation has no z-loss
    assert_equal({"nll": alone}, {"nll": nll(logits, labels).detach()})


# Further tokens


def further(model: Decoder, tokens: Tensor, labels: Tensor, here: Context) -> Tensor:
    """The objective by its formula: module k sees token i + k, and predicts the one behind it."""
    weights, config = dict(model.named_parameters()), model.config
    table = weights["embedding.weight"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[name], config.norm_eps)

    stream, _ = model.wiring(table[tokens], here)
    total = nll(stream @ weights["head.weight"].T, labels)
    for k in range(1, config.mtp + 1):
        name = f"mtp.{k - 1}"
        rows = []
        for i in range(S):
            token = table[tokens[min(i + k, S - 1)]]
            joined = (
                weights[f"{name}.join.stream"] @ norm(f"{name}.norm_stream.weight", stream[i]).T
            )
            joined = (
                joined + weights[f"{name}.join.token"] @ norm(f"{name}.norm_token.weight", token).T
            )
            rows.append(joined.T)
        predictor = model.mtp[k - 1]
        stream, _ = predictor.wiring(torch.stack(rows), here)
        wanted = torch.full_like(labels, -100)
        for i in range(S - k):
            same = True if here.documents is None else here.documents[i] == here.documents[i + k]
            wanted[i] = torch.where(torch.as_tensor(same), labels[i + k], -100)
        share = config.mtp_weight / config.mtp
        total = total + share * nll(stream @ weights["head.weight"].T, wanted)
    return total


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_further_tokens(depth: int, packed: bool) -> None:
    model = model_of(config_of("*-", mtp=depth, mtp_pattern="M-", mtp_weight=0.4), 2)
    tokens, labels = data(2)
    cut = torch.tensor([5, 21])
    place = torch.arange(S)[:, None].expand(S, B)
    documents = (place >= cut).long() if packed else None
    positions = place - cut * (place >= cut) if packed else place
    here = Context(positions, documents)
    compare(model, model(tokens, here, labels)[0], further(model, tokens, labels, here))
    with evaluating(model):  # of the next token alone
        logits = model(tokens, Context(positions, documents))
        loss, _ = model(tokens, Context(positions, documents), labels)
    assert_equal({"loss": loss}, {"loss": nll(logits, labels)})


def test_rows_shorter_than_the_depth() -> None:
    model = model_of(config_of("*-", mtp=3), 2)
    tokens, labels = (t[:2] for t in data(2))
    here = Context(torch.arange(2)[:, None].expand(2, B))
    objective, report = model(tokens, here, labels)
    objective.backward()
    assert report.extras["mtp"].isfinite()


# THOR


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_thor_is_two_dense_passes(monkeypatch: pytest.MonkeyPatch, z: float) -> None:
    """Experts known, each pass is a dense model with their MLPs, sample by sample."""
    config = config_of("*T*T", thor_alpha=0.7, logit_z=z)
    model = model_of(config, 3)
    tokens, labels = data(3)
    g = torch.Generator().manual_seed(3)
    drawn = {t: torch.randint(config.experts, (2 * B,), generator=g) for t in (1, 3)}

    def known(n: int, *keys: int | Tensor) -> Tensor:
        return drawn[int(keys[1])]

    monkeypatch.setattr(thor, "draw_integers", known)
    objective, report = model(tokens, context(), labels)

    weights = dict(model.named_parameters())
    logs = []
    for column in range(2 * B):
        b = column % B
        dense = model_of(config_of("*-*-", ffn=config.expert_ffn), 3)
        own = {n: p for n, p in weights.items() if "blocks.1" not in n and "blocks.3" not in n}
        for t in (1, 3):
            expert = int(drawn[t][column])
            block = f"blocks.{t}"
            for role in ("gate", "up", "down"):
                own[f"{block}.{role}"] = weights[f"{block}.{role}"][expert]
        row = Context(torch.arange(S)[:, None])
        paths = {canonical(path): path for path, _ in nn.Module.named_parameters(dense)}
        at_paths = {paths[name]: tensor for name, tensor in own.items()}
        logits = torch.func.functional_call(dense, at_paths, (tokens[:, b : b + 1], row))
        logs.append(logits[:, 0])
    one, two = torch.stack(logs[:B], 1), torch.stack(logs[B:], 1)
    valid = labels != -100
    p, q = one.log_softmax(-1)[valid], two.log_softmax(-1)[valid]
    both = F.kl_div(p, q, log_target=True, reduction="sum")
    both = both + F.kl_div(q, p, log_target=True, reduction="sum")
    consistency = 0.7 * 0.5 * both
    squares = sum(t.logsumexp(-1)[valid].square().sum() for t in (one, two))
    expected = nll(one, labels) + nll(two, labels) + consistency + z * squares
    mean = (nll(one, labels) + nll(two, labels)) / 2
    assert_equal(
        {
            "consistency": report.extras["consistency"],
            "mean": objective.detach() - sum(report.extras.values()),
        },
        {"consistency": consistency.detach(), "mean": mean.detach()},
    )
    compare(model, objective, expected)


def test_a_context_serves_after_a_training_pass() -> None:
    """Tables of the doubled batch stay with it."""
    model, (tokens, labels) = model_of(config_of("*T"), 3), data(3)
    here, fresh = context(), context()
    model(tokens, here, labels)[0].backward()
    with torch.no_grad():
        assert torch.equal(model(tokens, here), model(tokens, fresh))


def test_thor_with_one_expert_is_twice_the_dense_loss() -> None:
    model = model_of(config_of("*T", experts=1), 4)
    tokens, labels = data(4)
    objective, report = model(tokens, context(), labels)
    with evaluating(model):
        single, _ = model(tokens, context(), labels)
    assert report.extras["consistency"].abs() < 1e-12
    assert_equal({"loss": objective.detach()}, {"loss": 2 * single})


def test_thor_draws_by_step_place_group_and_pass() -> None:
    """Every expert has its turn, independently; groups of samples draw alike wherever they are."""
    block = CARDS["T"].build(config_of("T", experts=4, balance_samples=2), 0.1)

    def experts(key: int, index: int, samples: list[int], passes: int) -> list[int]:
        n = len(samples)
        here = Context(torch.zeros(1, n), samples=torch.tensor(samples), rng_key=key, passes=passes)
        x = torch.zeros(1, n, 12)
        order = block.begin(x, here.at(index)).order
        owner = torch.repeat_interleave(torch.arange(4), order.counts)
        return owner[order.rows].tolist()

    one = experts(7, 3, [4, 5, 6, 7, 4, 5, 6, 7], 2)
    assert one[:4:2] == one[1:4:2]  # a group is whole
    assert one[2:4] == experts(7, 3, [6, 7], 1)  # and drawn alike in any micro-batch
    table = torch.tensor(
        [experts(step, index, [0, 2, 0, 2], 2) for step in range(300) for index in (1, 3)]
    )
    table = table.view(300, -1)  # columns: place, pass and group
    shares = F.one_hot(table, 4).double().mean(0)
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5
    coincide = (table[:, :, None] == table[:, None, :]).double().mean(0)
    off = ~torch.eye(table.shape[1], dtype=torch.bool)
    assert (coincide[off] - 0.25).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5


# WideNet


@pytest.mark.parametrize("fields", [{}, {"residual": "ladder"}])
def test_shared_depth_is_tied_weights(fields: dict[str, Any]) -> None:
    """Gradients of the shared sub-blocks are the sums over their places; norms are individual."""
    shared = model_of(config_of("*EM", repeat=3, share=True, balance=0.3, **fields), 5)
    tied = model_of(config_of("*EM", repeat=3, balance=0.3, **fields), 5)
    own = dict(shared.named_parameters())

    def source(name: str) -> str:
        if not name.startswith("blocks."):
            return name
        index, rest = name.removeprefix("blocks.").split(".", 1)
        return f"blocks.{int(index) % 3}.{rest}"

    tied.load_state_dict({n: own[source(n)].detach() for n, _ in tied.named_parameters()})
    tokens, labels = data(5)
    loss, ours = shared(tokens, context(), labels)
    expected, theirs = tied(tokens, context(), labels)
    loss.backward()
    expected.backward()
    sums: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in own.items()}
    for name, gradient in gradients(tied).items():
        sums[source(name)] += gradient
    assert_equal(gradients(shared), sums)
    assert (len(shared.wiring.norms), len(shared.wiring.blocks)) == (9, 3)
    assert_equal(
        {str(t): term for t, term in ours.terms.items()},
        {str(t): term for t, term in theirs.terms.items()},
    )
