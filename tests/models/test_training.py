"""The training mode decides the function that is computed; the gradient mode does not."""

from typing import Any

import pytest
import torch
from equal import assert_equal
from small import config_of, context, data, model_of
from torch import Tensor

from colonnade.models.decoder import Decoder

# Settings that act only in training, each with the fields of the equivalent model without them.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "noise, capacity": (
        "*E-E", {"router_noise": 0.5, "capacity": 0.5, "balance": 0.1, "router_z": 0.1},
        {"router_noise": 0.0, "capacity": None},
    ),
    "THOR": ("*T-", {"thor_alpha": 0.5, "logit_z": 0.1}, {}),
    "z-loss": ("*-", {"logit_z": 0.1}, {"logit_z": 0.0}),
    "further tokens": ("*-", {"mtp": 2, "mtp_pattern": "*E", "balance": 0.1}, {}),
}  # fmt: skip


def run_pass(model: Decoder, seed: int) -> dict[str, Tensor]:
    """Returns objective and report of a pass, by name."""
    tokens, labels = data(seed)
    objective, report = model(tokens, context(rng_key=5), labels)
    entries = {f"{field} {key}": value for field, values in report._asdict().items()
               for key, value in values.items()}  # fmt: skip
    return {"objective": objective.detach(), **entries}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", CASES)
def test_the_objective_does_not_depend_on_gradients(name: str) -> None:
    """It is the same with and without gradients in each mode, and differs between the modes."""
    pattern, fields, _ = CASES[name]
    model, results = model_of(config_of(pattern, **fields), 1), {}
    for training in (True, False):
        model.train(training)
        results[training] = run_pass(model, 1)
        with torch.no_grad():
            assert equal(run_pass(model, 1), results[training])
    assert not torch.equal(results[True]["objective"], results[False]["objective"])
    assert len(results[True]) > 1
    assert len(results[False]) == 1  # no report


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_of_the_plain_model(name: str) -> None:
    pattern, fields, plain = CASES[name]
    model = model_of(config_of(pattern, **fields), 2).eval()
    tokens, labels = data(2)
    logits = model_of(config_of(pattern, **{**fields, **plain}), 2)(tokens, context(rng_key=5))
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    objective = model(tokens, context(rng_key=5), labels)[0]
    assert_equal({"objective": objective.detach()}, {"objective": nll.detach()})


def test_singular_vectors_advance_without_gradients_too() -> None:
    """They advance after `begin_step` in training mode, whatever the gradient mode."""
    model = model_of(config_of("-", sigma_reparam=True), 3)
    state = model.wiring.block(0).first.up_left
    run_pass(model, 3)  # the first use initialises them
    with torch.no_grad():
        model.wiring.block(0).first.up.add_(0.1)
        for training in (False, True):
            before = state.clone()
            model.begin_step()
            run_pass(model.train(training), 3)
            assert torch.equal(state, before) == (not training)
