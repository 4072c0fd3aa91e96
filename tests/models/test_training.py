"""Training is said by the mode: it changes what is computed, and whether gradients are kept not."""

from typing import Any

import pytest
import torch
from equal import assert_equal
from small import config_of, context, data, model_of
from torch import Tensor

from colonnade.models.decoder import Decoder

# Everything that only training has; each with what makes it the plain model.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "noise, capacity": (
        "*E-E", {"router_noise": 0.5, "capacity": 0.5, "balance": 0.1, "router_z": 0.1},
        {"router_noise": 0.0, "capacity": None},
    ),
    "THOR": ("*T-", {"thor_alpha": 0.5, "logit_z": 0.1}, {}),
    "z-loss": ("*-", {"logit_z": 0.1}, {"logit_z": 0.0}),
    "further tokens": ("*-", {"mtp": 2, "mtp_pattern": "*E", "balance": 0.1}, {}),
}  # fmt: skip


def passed(model: Decoder, seed: int) -> dict[str, Tensor]:
    """Objective and report of a pass."""
    tokens, labels = data(seed)
    objective, report = model(tokens, context(rng_key=5), labels)
    found = {f"{kind} {key}": value for kind, part in report._asdict().items()
             for key, value in part.items()}  # fmt: skip
    return {"objective": objective.detach(), **found}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", CASES)
def test_the_objective_does_not_depend_on_gradients(name: str) -> None:
    """In either mode; and the modes differ."""
    pattern, fields, _ = CASES[name]
    model, found = model_of(config_of(pattern, **fields), 1), {}
    for training in (True, False):
        model.train(training)
        found[training] = passed(model, 1)
        with torch.no_grad():
            assert equal(passed(model, 1), found[training])
    assert not torch.equal(found[True]["objective"], found[False]["objective"])
    assert len(found[True]) > 1
    assert len(found[False]) == 1  # no report


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_of_the_plain_model(name: str) -> None:
    pattern, fields, plain = CASES[name]
    model = model_of(config_of(pattern, **fields), 2).eval()
    tokens, labels = data(2)
    logits = model_of(config_of(pattern, **{**fields, **plain}), 2)(tokens, context(rng_key=5))
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    found = model(tokens, context(rng_key=5), labels)[0]
    assert_equal({"objective": found.detach()}, {"objective": nll.detach()})


def test_singular_vectors_advance_without_gradients_too() -> None:
    """A step that began is what counts, and the mode."""
    model = model_of(config_of("-", sigma_reparam=True), 3)
    state = model.wiring.block(0).first.up_left
    passed(model, 3)  # the first use starts them
    with torch.no_grad():
        model.wiring.block(0).first.up.add_(0.1)
        for training in (False, True):
            before = state.clone()
            model.begin_step()
            passed(model.train(training), 3)
            assert torch.equal(state, before) == (not training)
