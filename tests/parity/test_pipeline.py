"""Pipelines against one process: every schedule, kinds of models, and all other parallelism."""

from typing import Any

import pytest
from ranks import Ranks
from test_data_parallel import LADDER, Trace, compare, recipe_for, trained

SMALL: dict[str, Any] = {"vocab": 64, "ffn": 48, "hidden": 32, "heads": 8, "experts": 4}
STEERED = {
    "router_score": "sigmoid", "router_bias": True, "router_bias_rate": 0.1, "router_noise": 0.3,
    "capacity": 1.0, "balance_sequence": 0.1, "shared_ffn": 16, "balance_samples": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ladder, tied": ("M-*E", {**LADDER, "tied": True}),
    "steered": ("E-E*", STEERED),
    "THOR": ("*TT-", {"thor_alpha": 0.5, "balance_samples": 1}),
    "shared depth": ("*E", {"repeat": 4, "share": True}),
    "multi-token": ("*-*-", {"mtp": 2, "mtp_pattern": "*E", "logit_z": 0.1, "logit_cap": 4.0}),
    "multi-token, tied ladder": ("*-*-", {"mtp": 1, "mtp_pattern": "*E", "tied": True, **LADDER}),
    "σReparam, polynomials": ("*-E*", {"sigma_reparam": True, "activation": "polynorm"}),
    "MLA, pre-RMSNorm": (
        "*-*-",
        {"norm": "pre_rms", "attention": "mla", "kv_heads": None, "rope_dim": 4, "sinks": True},
    ),
    "norms after, ladder": ("*-M-", {"norm_position": "both", "norm": "layer", **LADDER}),
    "parallel": ("*-*-", {"residual": "parallel"}),
    "ladder at the end": ("*-M-", {"residual": "ladder", "ladder_last": 2}),
    "recurrences": ("mD-G", LADDER),
    "muP": ("*-M-", {"mup_base": {"hidden": 16, "ffn": 24}}),
}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "bfs", "zb1p", "zbv", "dualpipev")
CASES = [
    (model, schedule)
    for m, model in enumerate(MODELS)
    for n, schedule in enumerate(SCHEDULES)
]

_references: dict[str, Trace] = {}


def reference(ranks1: Ranks, name: str) -> Trace:
    """The trace of one process, trained once for all layouts."""
    if name not in _references:
        pattern, fields = MODELS[name]
        _references[name] = ranks1.run(trained, recipe_for(pattern, {}, 16, **SMALL | fields))[0]
    return _references[name]


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_two_stages_equal_one_process(
    ranks1: Ranks, ranks2: Ranks, name: str, schedule: str
) -> None:
    pattern, fields = MODELS[name]
    layout = {"pp": 2, "schedule": schedule}
    trace = ranks2.run(trained, recipe_for(pattern, layout, 4, **SMALL | fields))[0]
    compare(trace, reference(ranks1, name))
