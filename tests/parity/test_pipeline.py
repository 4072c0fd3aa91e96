"""Pipelines against one process: every schedule, kinds of models, and all other parallelism."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from equal import assert_equal
from ranks import Ranks
from test_data_parallel import BIASED, LADDER, MULTIPLIERS, Trace, compare, recipe_for, trained
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_engine
from colonnade.launcher.train.schedule import micro_batches
from colonnade.launcher.verify.trace import random_rows
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.passes import Inputs
from colonnade.parallel.pipeline import run
from colonnade.parallel.world import World

SMALL: dict[str, Any] = {"vocab": 64, "ffn": 48, "hidden": 32, "heads": 8, "experts": 4}
STEERED = {
    "router_score": "sigmoid", "router_bias": True, "router_bias_rate": 0.1, "router_noise": 0.3,
    "capacity": 1.0, "balance_sequence": 0.1, "shared_ffn": 16, "balance_samples": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ladder, tied": ("M-*E", {**LADDER, **BIASED, "tied": True}),
    "eight, ladder, tied": ("M-*E", {**LADDER, "tied": True, "repeat": 2, "balance_samples": 1}),
    "steered": ("E-E*", STEERED),
    "THOR": ("*TT-", {"thor_alpha": 0.5, "balance_samples": 1}),
    # every weight of the last rank is a copy
    "shared depth": (
        "*E",
        {"repeat": 4, "share": True, "tied": True, "norm": "layer", "norm_weight": False},
    ),
    # ranks build their weights in different orders
    "shared depth, long": ("*-M-", {"repeat": 2, "share": True}),
    "multi-token": ("*-*-", {"mtp": 2, "mtp_pattern": "*E", "logit_z": 0.1, "logit_cap": 4.0}),
    "multi-token, tied ladder": ("*-*-", {"mtp": 1, "mtp_pattern": "*E", "tied": True, **LADDER}),
    "σReparam, polynomials": ("*-E*", {"sigma_reparam": True, "activation": "polynorm"}),
    "MLA, pre-RMSNorm": (
        "*-*-",
        {"norm": "pre_rms", "attention": "mla", "kv_heads": None, "rope_dim": 4, "sinks": True},
    ),
    "norms after, ladder": ("*-M-", {"norm_position": "both", "norm": "layer", **LADDER}),
    "norms by kind, ladder": ("G-*-", {"norm_after": "*", **LADDER}),
    "parallel": ("*-*-", {"residual": "parallel"}),
    "ladder at the end": ("*-M-", {"residual": "ladder", "ladder_last": 2, **MULTIPLIERS}),
    "recurrences": ("mD-G", LADDER),
    "muP": ("*-M-", {"mup_base": {"hidden": 16, "ffn": 24}}),
}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "bfs", "zb1p", "zbv", "dualpipev")
CASES = [(model, schedule) for model in MODELS for schedule in SCHEDULES]

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


FOUR: dict[str, dict[str, Any]] = {
    "FSDP2": {"dp_shard": 2},
    "HSDP": {"dp_replicate": 2},
    "tp": {"tp": 2},
    "tp, no sequence": {"tp": 2, "sequence": False},
    "cp": {"cp": 2},
    "ep": {"dp_shard": 2, "ep": 2},
    "ep, tp, etp=1": {"tp": 2, "ep": 2, "etp": 1},
    "cp, all-gather, heads": {"cp": 2, "context": "allgather", "recurrence": "heads"},
}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("layout", FOUR)
def test_with_another_axis(ranks1: Ranks, ranks4: Ranks, layout: str, schedule: str) -> None:
    name = "ladder, tied"
    pattern, fields = MODELS[name]
    degrees = {"pp": 2, "schedule": schedule, **FOUR[layout]}
    micro = 16 // 4 // (degrees.get("dp_shard", 1) * degrees.get("dp_replicate", 1))
    trace = ranks4.run(trained, recipe_for(pattern, degrees, micro, **SMALL | fields))[0]
    compare(trace, reference(ranks1, name))


@pytest.mark.parametrize("recompute", ["block", "selective"])
@pytest.mark.parametrize(
    ("layout", "schedule"), [("FSDP2", "1f1b"), ("ep, tp, etp=1", "zbv"), ("cp", "zb1p")]
)
def test_recomputation(
    ranks1: Ranks, ranks4: Ranks, layout: str, schedule: str, recompute: str
) -> None:
    name = "ladder, tied"
    pattern, fields = MODELS[name]
    degrees = {"pp": 2, "schedule": schedule, **FOUR[layout]}
    micro = 2 if "dp_shard" in degrees else 4
    recipe = recipe_for(pattern, degrees, micro, recompute=recompute, **SMALL | fields)
    compare(ranks4.run(trained, recipe)[0], reference(ranks1, name))


EIGHT: dict[str, dict[str, Any]] = {
    "1f1b, tp, cp": {"schedule": "1f1b", "tp": 2, "cp": 2},
    "zbv, tp, FSDP2": {"schedule": "zbv", "tp": 2, "dp_shard": 2},
    "interleaved, ep, cp": {"schedule": "interleaved", "dp_shard": 2, "ep": 2, "cp": 2},
    "pp=4, tp": {"schedule": "1f1b", "pp": 4, "tp": 2},
    "pp=4, dualpipev, FSDP2": {"schedule": "dualpipev", "pp": 4, "dp_shard": 2},
    "pp=8": {"schedule": "zb1p", "pp": 8},
}


@pytest.mark.parametrize("layout", EIGHT)
def test_eight_ranks(ranks1: Ranks, ranks8: Ranks, layout: str) -> None:
    name = "eight, ladder, tied"
    pattern, fields = MODELS[name]
    degrees = {"pp": 2, **EIGHT[layout]}
    micro = 1 if "dp_shard" in degrees or degrees["pp"] == 8 else 2
    trace = ranks8.run(trained, recipe_for(pattern, degrees, micro, **SMALL | fields))[0]
    compare(trace, reference(ranks1, name))


def test_deferred_gradients_are_summed_in_fp32(ranks4: Ranks) -> None:
    """In bf16 under FSDP2, zero bubble sums the same gradients of micro-batches as 1F1B does."""
    pattern, fields = MODELS["ladder, tied"]
    traces = [
        ranks4.run(
            trained,
            recipe_for(pattern, {"pp": 2, "schedule": schedule}, 2, "bf16", **SMALL | fields),
        )[0]
        for schedule in ("1f1b", "zb1p")
    ]
    first = [{n: t for n, t in trace.gradients.items() if "step 1" in n} for trace in traces]
    assert_equal(first[1], first[0], 1e-6)


COUNTED = ("all_gather_into_tensor", "reduce_scatter_tensor", "_allgather_base_",
           "_reduce_scatter_base_")  # fmt: skip


def fsdp_calls(rank: int, size: int, recipe: Recipe) -> tuple[Counter[str], int]:
    """The collectives that FSDP2 calls in a step, by name, and the number of its groups."""
    world = World(rank, size, torch.device("cpu"))
    engine = build_engine(recipe, world)
    calls: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = operator.overloadpacket.__name__
            if name in COUNTED:
                calls[name] += 1
            return operator(*args, **kwargs or {})

    samples = micro_batches(training_stages(recipe)[0], 0, *data_rank(engine.mesh))
    batches = [random_rows(rows, recipe.model.vocab, recipe.train.seq_len) for rows in samples]
    with Count():
        engine.gradients(batches, samples, 16.0, 0)
    groups = {id(m._get_fsdp_state()) for m in engine.model.modules() if isinstance(m, FSDPModule)}
    return calls, len(groups)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_fsdp_gathers_and_reduces_once_a_step(ranks4: Ranks, schedule: str) -> None:
    """Every group once, whatever the number of micro-batches and stages of a rank."""
    pattern, fields = MODELS["ladder, tied"]
    layout = {"pp": 2, "schedule": schedule}
    recipe = recipe_for(pattern, layout, 2, "fp32", **SMALL | fields)
    for calls, groups in ranks4.run(fsdp_calls, recipe):
        assert set(calls.values()) == {groups}, calls
        assert len(calls) == 2


def products(rank: int, size: int, recipe: Recipe) -> tuple[int, int]:
    """The FLOPs of matrix products of this rank in a step, and in the forward passes alone."""
    engine = build_engine(recipe, World(rank, size, torch.device("cpu")))
    samples = micro_batches(training_stages(recipe)[0], 0, *data_rank(engine.mesh))
    batches = [random_rows(rows, recipe.model.vocab, recipe.train.seq_len) for rows in samples]
    inputs = [Inputs(*both) for both in zip(batches, samples, strict=True)]
    counters = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with counters[0]:
        engine.gradients(batches, samples, 16.0, 0)
    with counters[1]:
        engine.passes.evaluate(inputs)
    return counters[0].get_total_flops(), counters[1].get_total_flops()


@pytest.mark.parametrize("schedule", ["zb1p", "zbv", "dualpipev"])
def test_split_backward_costs_no_forward(ranks2: Ranks, schedule: str) -> None:
    """Input and weight gradients computed apart take as many products as together; with
    recomputation at most one forward pass more."""

    def flops(name: str, recompute: str) -> tuple[int, int]:
        layout = {"pp": 2, "schedule": name}
        recipe = recipe_for("*-M-*-", layout, 4, "fp64", recompute, **SMALL | LADDER)
        steps, forwards = zip(*ranks2.run(products, recipe), strict=True)
        return sum(steps), sum(forwards)

    plain, forward = flops(schedule, "none")
    assert plain == flops("1f1b", "none")[0]
    assert 0 < flops(schedule, "block")[0] - plain <= forward


def losses_when_sends_wait(rank: int, size: int, recipe: Recipe) -> list[float]:
    """A step and a validation in which every send waits for its recv, as one of NCCL may."""
    engine = build_engine(recipe, World(rank, size, torch.device("cpu")))
    samples = micro_batches(training_stages(recipe)[0], 0, *data_rank(engine.mesh))
    batches = [random_rows(rows, recipe.model.vocab, recipe.train.seq_len) for rows in samples]
    inputs = [Inputs(*both) for both in zip(batches, samples, strict=True)]
    with patch.object(run, "SENDS", 0):
        losses = [engine.gradients(batches, samples, 16.0, 0).loss]
        outcomes = engine.passes.evaluate(inputs)
    return losses + [float(o.objective) for o in outcomes if o.objective is not None]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_rank_waits_for_ever(ranks2: Ranks, schedule: str) -> None:
    recipe = recipe_for("*-*-", {"pp": 2, "schedule": schedule}, 4, **SMALL)
    first, second = ranks2.run(losses_when_sends_wait, recipe)
    assert first[0] == second[0]
    assert len(first) + len(second) == 2 + 4
