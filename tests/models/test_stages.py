"""Stages of a model, run in order in this process, against the model without stages."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from equal import assert_equal
from oracle import gradients
from small import config_of, context, data, model_of
from torch import Tensor

from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.report import PassReport
from colonnade.models.wiring import Stage
from colonnade.parallel.materialise import materialise
from colonnade.parallel.recompute import recompute as recompute_model

CASES: dict[str, dict[str, Any]] = {
    f"{residual}, {position}": {"residual": residual, "norm_position": position}
    for residual in ("standard", "ladder", "parallel")
    for position in ("before", "after", "both")
}
CASES |= {
    "ladder, by kind": {"residual": "ladder", "norm_position": "both", "norm_after": "*"},
    "standard, by kind": {"norm_after": "*"},
    "ladder at the end": {"residual": "ladder", "ladder_last": 2, "norm_position": "both"},
    "muP, sigma-reparam": {"mup_base": {"hidden": 6, "ffn": 5}, "sigma_reparam": True},
}


def divisions(count: int) -> list[list[Stage]]:
    """Returns every division of so many sub-blocks into two or three stages."""
    inner = [b for n in (1, 2) for b in itertools.combinations(range(1, count), n)]
    return [[Stage(*s) for s in itertools.pairwise((0, *bounds, count))] for bounds in inner]


def stages_of(config: ModelConfig, stages: Sequence[Stage]) -> list[Decoder]:
    """Builds the stages on the meta device."""
    with torch.device("meta"):
        return [Decoder(config, 7, [stage]).double() for stage in stages]


def run(models: Sequence[Decoder], tokens: Tensor, labels: Tensor | None) -> tuple[Any, PassReport]:
    """Returns the output of the last stage, and the merged reports of all."""
    output, report = None, PassReport({}, {}, {})
    for model in models:
        output = model(tokens, context(groups=3.0, rng_key=1), labels, state=output)
        if labels is not None:
            output, stage_report = output
            report = report.merged(stage_report)
    return output, report


def flat(report: PassReport) -> dict[str, Tensor]:
    """Returns all tensors of a report by name."""
    fields = report._asdict().items()
    return {f"{field} {key}": t.double() for field, values in fields for key, t in values.items()}


def check(pattern: str, recompute: str, **fields: Any) -> None:
    """Compares objective, report, gradients and logits under every division into stages."""
    config = config_of(pattern, balance=0.1, router_z=0.1, **fields)
    whole = model_of(config, seed=1)
    tokens, labels = data(1)
    expected, theirs = run([whole], tokens, labels)
    expected.backward()
    weights = whole.state_dict()
    for division in divisions(len(pattern)):
        models = stages_of(config, division)
        for model in models:
            model.to_empty(device="cpu").load_state_dict(
                {n: weights[n] for n in model.state_dict()}
            )
            recompute_model(model, recompute)
        names = [name for model in models for name in model.state_dict()]
        assert sorted(names) == sorted(weights)  # each weight in one stage
        objective, ours = run(models, tokens, labels)
        objective.backward()
        stage_gradients = {n: g for model in models for n, g in gradients(model).items()}
        assert_equal({"objective": objective.detach()}, {"objective": expected.detach()}, 1e-12)
        assert_equal(flat(ours), flat(theirs), 1e-12)
        assert_equal(stage_gradients, gradients(whole), 1e-12)
        with torch.no_grad():
            assert_equal({"x": run(models, tokens, None)[0]}, {"x": run([whole], tokens, None)[0]})


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("name", CASES)
def test_stages_are_the_model(name: str, recompute: str) -> None:
    check("*-E-M", recompute, **CASES[name])


@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_every_stage_has_both_passes_of_thor(residual: str) -> None:
    check("*T*T", "none", residual=residual, thor_alpha=0.5, logit_z=0.1)


@pytest.mark.parametrize("name", CASES)
def test_first_weights_are_those_of_the_model(name: str) -> None:
    config, cpu = config_of("*-E-M", **CASES[name]), torch.device("cpu")
    (whole,) = stages_of(config, [Stage(0, 5)])
    materialise(whole, cpu, seed=3)
    for model in stages_of(config, [Stage(0, 2), Stage(2, 3), Stage(3, 5)]):
        materialise(model, cpu, seed=3)
        for tensor_name, tensor in model.state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[tensor_name]), tensor_name


@pytest.mark.parametrize("stage", [(0, 3), (1, 1), (-1, 1)])
def test_invalid_stages_are_refused(stage: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="the row has 2 sub-blocks"):
        Decoder(config_of("*-"), stages=[Stage(*stage)])
