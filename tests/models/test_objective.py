"""The objective: z-loss, capped logits, multi-token prediction (MTP), THOR's passes, WideNet."""

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
from colonnade.parallel.passes import evaluating

TABLE = [
    Row("any row", "z-loss on logits; soft-capping", "their formulas"),
    Row("any row", "further tokens (MTP), packed or not", "its formula, token by token"),
    Row("T", "two passes with draws of their own, consistency loss", "dense models of the experts"),
    Row("*EM", "shared depth (WideNet); ladder", "an unshared model with tied weights"),
]


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy summed over valid labels."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def compare(model: Decoder, objective: Tensor, expected: Tensor) -> None:
    """Compares both values, and the gradients of all parameters."""
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
        objective, _ = model(tokens, context(), labels)  # evaluation has no z-loss
    assert_equal({"nll": objective}, {"nll": nll(logits, labels).detach()})


# Multi-token prediction


def mtp_objective(model: Decoder, tokens: Tensor, labels: Tensor, context: Context) -> Tensor:
    """Computes the objective: module k reads token i + k and predicts token i + k + 1."""
    weights, config = dict(model.named_parameters()), model.config
    table = weights["embedding.weight"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[name], config.norm_eps)

    stream, _ = model.wiring(table[tokens], context)
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
        stream, _ = predictor.wiring(torch.stack(rows), context)
        next_labels, documents = torch.full_like(labels, -100), context.documents
        for i in range(S - k):
            same_document = True if documents is None else documents[i] == documents[i + k]
            next_labels[i] = torch.where(torch.as_tensor(same_document), labels[i + k], -100)
        weight = config.mtp_weight / config.mtp
        total = total + weight * nll(stream @ weights["head.weight"].T, next_labels)
    return total


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_multi_token_prediction(depth: int, packed: bool) -> None:
    model = model_of(config_of("*-", mtp=depth, mtp_pattern="M-", mtp_weight=0.4), 2)
    tokens, labels = data(2)
    start = torch.tensor([5, 21])  # of the second document in each row
    index = torch.arange(S)[:, None].expand(S, B)
    documents = (index >= start).long() if packed else None
    positions = index - start * (index >= start) if packed else index
    packing = Context(positions, documents)
    expected = mtp_objective(model, tokens, labels, packing)
    compare(model, model(tokens, packing, labels)[0], expected)
    with evaluating(model):  # the loss of the next token only
        logits = model(tokens, Context(positions, documents))
        loss, _ = model(tokens, Context(positions, documents), labels)
    assert_equal({"loss": loss}, {"loss": nll(logits, labels)})


def test_rows_shorter_than_the_depth() -> None:
    model = model_of(config_of("*-", mtp=3), 2)
    tokens, labels = (t[:2] for t in data(2))
    short = Context(torch.arange(2)[:, None].expand(2, B))
    objective, report = model(tokens, short, labels)
    objective.backward()
    assert report.extras["mtp"].isfinite()


# THOR


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_thor_is_two_dense_passes(monkeypatch: pytest.MonkeyPatch, z: float) -> None:
    """With known experts each pass is a dense model with their MLPs, sample by sample."""
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
        dense_weights = {
            n: p for n, p in weights.items() if "blocks.1" not in n and "blocks.3" not in n
        }
        for t in (1, 3):
            expert = int(drawn[t][column])
            block = f"blocks.{t}"
            for role in ("gate", "up", "down"):
                dense_weights[f"{block}.{role}"] = weights[f"{block}.{role}"][expert]
        row = Context(torch.arange(S)[:, None])
        paths = {canonical(path): path for path, _ in nn.Module.named_parameters(dense)}
        at_paths = {paths[name]: tensor for name, tensor in dense_weights.items()}
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
    """The rotary tables of the doubled batch are not left in the caller's context."""
    model, (tokens, labels) = model_of(config_of("*T"), 3), data(3)
    reused, fresh = context(), context()
    model(tokens, reused, labels)[0].backward()
    with torch.no_grad():
        assert torch.equal(model(tokens, reused), model(tokens, fresh))


def test_thor_with_one_expert_is_twice_the_dense_loss() -> None:
    model = model_of(config_of("*T", experts=1), 4)
    tokens, labels = data(4)
    objective, report = model(tokens, context(), labels)
    with evaluating(model):
        single, _ = model(tokens, context(), labels)
    assert report.extras["consistency"].abs() < 1e-12
    assert_equal({"loss": objective.detach()}, {"loss": 2 * single})


def test_thor_draws_by_step_place_group_and_pass() -> None:
    """Draws are uniform and independent; a balance group draws alike in any micro-batch."""
    block = CARDS["T"].build(config_of("T", experts=4, balance_samples=2), 0.1)

    def experts(key: int, index: int, samples: list[int], passes: int) -> list[int]:
        n = len(samples)
        samples_of = torch.tensor(samples)
        keys = Context(torch.zeros(1, n), samples=samples_of, rng_key=key, passes=passes)
        order = block.begin(torch.zeros(1, n, 12), keys.at(index)).sent.order
        expert_of_row = torch.repeat_interleave(torch.arange(4), order.counts)
        return expert_of_row[order.rows].tolist()

    one = experts(7, 3, [4, 5, 6, 7, 4, 5, 6, 7], 2)
    assert one[:4:2] == one[1:4:2]  # the samples of a group have the same expert
    assert one[2:4] == experts(7, 3, [6, 7], 1)  # and the same draw in any micro-batch
    table = torch.tensor(
        [experts(step, index, [0, 2, 0, 2], 2) for step in range(300) for index in (1, 3)]
    )
    table = table.view(300, -1)  # columns: index in the row, pass and group
    shares = F.one_hot(table, 4).double().mean(0)
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5
    coincide = (table[:, :, None] == table[:, None, :]).double().mean(0)
    off = ~torch.eye(table.shape[1], dtype=torch.bool)
    assert (coincide[off] - 0.25).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5


# WideNet


@pytest.mark.parametrize("fields", [{}, {"residual": "ladder"}])
def test_shared_depth_is_tied_weights(fields: dict[str, Any]) -> None:
    """Gradients of shared sub-blocks are sums over their uses; norms are not shared."""
    shared = model_of(config_of("*EM", repeat=3, share=True, balance=0.3, **fields), 5)
    tied = model_of(config_of("*EM", repeat=3, balance=0.3, **fields), 5)
    weights = dict(shared.named_parameters())

    def source(name: str) -> str:
        if not name.startswith("blocks."):
            return name
        index, rest = name.removeprefix("blocks.").split(".", 1)
        return f"blocks.{int(index) % 3}.{rest}"

    tied.load_state_dict({n: weights[source(n)].detach() for n, _ in tied.named_parameters()})
    tokens, labels = data(5)
    loss, ours = shared(tokens, context(), labels)
    expected, theirs = tied(tokens, context(), labels)
    loss.backward()
    expected.backward()
    sums: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in weights.items()}
    for name, gradient in gradients(tied).items():
        sums[source(name)] += gradient
    assert_equal(gradients(shared), sums)
    assert (len(shared.wiring.norms), len(shared.wiring.blocks)) == (9, 3)
    assert_equal(
        {str(t): term for t, term in ours.terms.items()},
        {str(t): term for t, term in theirs.terms.items()},
    )
