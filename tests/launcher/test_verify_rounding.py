"""`verify` distinguishes rounding from a fault by the noise that one process measures."""

from unittest.mock import patch

import pytest
import torch
from ranks import Ranks
from test_verify import LAYOUTS, TINY, reference, shown, small_recipe, world_of

from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify import run
from colonnade.launcher.verify.cases import Case
from colonnade.launcher.verify.equal import EXACT, NOISE_FACTOR, Difference, compare
from colonnade.launcher.verify.judgement import Pass, compare_traces, judge
from colonnade.launcher.verify.plan import Job
from colonnade.launcher.verify.rounding import ULP, Noise, measure_noise
from colonnade.launcher.verify.run import Findings, make_report
from colonnade.launcher.verify.shrink import in_one_process, on_case, shrink
from colonnade.launcher.verify.trace import KINDS, Trace, record_trace
from colonnade.parallel import engine
from colonnade.parallel.world import World


def test_steps_start_from_the_reference(ranks1: Ranks, ranks2: Ranks) -> None:
    """On every layout, gradients at step 2 depend on the given weights, not on those of step 1."""
    (exact,) = ranks1.run(reference)
    starts = {name: t + 0.1 for name, t in exact.parameters.items()}
    (expected,) = ranks1.run(restarted, None, starts)
    chained = compare(exact.gradients, expected.gradients)
    assert {d.name[:6] for d in chained if d.excess > 1} == {"step 2", "step 3"}
    for layout in LAYOUTS:
        trace = ranks2.run(restarted, layout, starts)[0]
        for kind in KINDS:
            ours, theirs = getattr(trace, kind), getattr(expected, kind)
            worst = compare(ours, theirs, EXACT, trace.replica_differences)[0]
            assert worst.excess <= 1, worst


def restarted(rank: int, size: int, layout: str | None, starts: dict[str, torch.Tensor]) -> Trace:
    small = small_recipe()
    recipe = on_case(small, size, Case.parse(layout), "fp64") if layout else in_one_process(small)
    return record_trace(recipe, world_of(rank, size), starts)


# Two narrow delta rules: norms over two channels amplify rounding by 10,000 times and more.
ILL_CONDITIONED = [
    "model.pattern=DD", "model.residual=", "model.norm_position=both", "model.hidden=32",
    "model.delta_key_dim=2", "model.delta_heads=2", "model.delta_value_dim=2",
    "model.delta_chunk=2", "model.delta_negative=true", "train.seed=12",
    *(f"model.{name}=" for name in ("heads", "kv_heads", "ffn", "mamba_head_dim", "mamba_state",
                                    "mamba_chunk", "experts", "top_k", "expert_ffn")),
]  # fmt: skip


def ill_conditioned() -> Recipe:
    return shrink(load_recipe("quickstart", ILL_CONDITIONED), 2, [Case.parse(LAYOUTS[0])])


def ill_conditioned_reference(rank: int, size: int) -> Trace:
    return record_trace(in_one_process(ill_conditioned()), world_of(rank, size))


def ill_conditioned_noise(rank: int, size: int, precision: str) -> Noise:
    return measure_noise(ill_conditioned(), precision, world_of(rank, size))


def ill_conditioned_ranks(
    rank: int, size: int, exact: Trace, precision: str, broken: bool
) -> Trace:
    recipe = on_case(ill_conditioned(), size, Case.parse(LAYOUTS[0]), precision)
    complete = (lambda model: None) if broken else engine.complete_gradients
    with patch.object(engine, "complete_gradients", complete):
        return record_trace(recipe, world_of(rank, size), exact.parameters)


def test_rounding_is_distinguished_from_a_fault(ranks1: Ranks, ranks2: Ranks) -> None:
    """An ill-conditioned recipe exceeds the bound, and is equal up to rounding.

    A missing reduction is still detected, in either precision without the other.
    """
    (exact,) = ranks1.run(ill_conditioned_reference)
    moved = {precision: ranks1.run(ill_conditioned_noise, precision)[0] for precision in ULP}

    def passes(broken: bool) -> list[Pass]:
        return [
            compare_traces(
                LAYOUTS[0], p, ranks2.run(ill_conditioned_ranks, exact, p, broken)[0], exact
            )
            for p in ULP
        ]

    right = passes(broken=False)
    assert [one.exceeds for one in right] == [False, True]
    fp64, fp32 = judge(right, moved)
    assert (fp64["verdict"], fp32["verdict"]) == ("equal", "equal up to rounding")
    assert fp32["equal"]
    assert fp64["amplification"] is None
    assert fp32["amplification"] > 1000
    gradients = fp32["compared"]["gradients"]
    assert gradients["rounding"] > 0
    assert gradients["allowed"] < gradients["difference"] < NOISE_FACTOR * gradients["noise"]
    lines = shown(fp64, fp32)
    assert any(line.startswith("  equal up to rounding: ") for line in lines)
    assert "; rounding alone moves it by" in "".join(lines)
    assert lines[-1] == f"equal: 1 layout, up to rounding: {LAYOUTS[0]} in fp32"

    for one in passes(broken=True):
        (result,) = judge([one], moved)
        assert result["verdict"] == "not equal"
        assert result["compared"]["gradients"]["worst"].startswith("step 1: ")


def test_noise_grows_with_the_ulp(ranks1: Ranks) -> None:
    """It is proportional to the ulp, except for the rounding of fp64 arithmetic itself."""
    exact, coarse = (ranks1.run(well_conditioned, precision)[0] for precision in ULP)
    assert exact.keys() == coarse.keys() == KINDS.keys()
    ratios = [coarse["gradients"][n] / d for n, d in exact["gradients"].items() if d > 1e-16]
    median = sorted(ratios)[len(ratios) // 2] / (ULP["fp32"] / ULP["fp64"])
    assert 0.25 < median < 4


def well_conditioned(rank: int, size: int, precision: str) -> Noise:
    return measure_noise(small_recipe(), precision, world_of(rank, size))


@pytest.mark.parametrize(
    ("difference", "moved", "judgement"),
    [
        (1.0, 0.0, "equal"),
        (1.1, 0.0, "unequal"),
        (1.1, 0.01, "rounding"),
        (1.0 + NOISE_FACTOR, 1.0, "rounding"),
        (1.1 + NOISE_FACTOR, 1.0, "unequal"),
        (1.1, 1000.0, "inconclusive"),  # of 1000: a fault could hide in it
        (float("inf"), float("inf"), "inconclusive"),
    ],
)
def test_judgement(difference: float, moved: float, judgement: str) -> None:
    """A tensor whose largest element is 1000 and whose bound is 1, with different noise."""
    assert Difference("a", difference, 1.0, 1000.0, noise=moved).judgement == judgement


def test_an_inconclusive_tensor_needs_a_proof_in_fp64() -> None:
    """A tensor that is inconclusive in fp32 is accepted only if the layout is equal in fp64."""

    def one(precision: str, difference: float) -> Pass:
        equal = {kind: [Difference("step 1: a", 0.0, 1.0, 10.0)] for kind in KINDS}
        norms = [Difference("step 1", difference, 1.0, 10.0)]
        return Pass("tp=2", precision, equal | {"norms": norms})

    moved = {p: {kind: {"step 1": 9.0, "step 1: a": 0.0} for kind in KINDS} for p in ULP}
    inconclusive = one("fp32", 5.0)
    assert judge([one("fp64", 0.5), inconclusive], moved)[1]["verdict"] == "equal up to rounding"
    for passes in ([inconclusive], [one("fp64", 5.0), inconclusive]):
        result = judge(passes, moved)[-1]
        assert result["verdict"] == "not equal"
        assert "so that fp32 tells nothing of it; try another train.seed, or " in shown(result)[-3]


def test_noise_is_measured_only_where_a_bound_is_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measured(small: Recipe, precision: str, world: World, residual: str) -> Noise:
        assert residual == "ladder"
        calls.append(precision)
        return {kind: {"step 1": 1.0} for kind in KINDS}

    monkeypatch.setattr(run, "measure_noise", measured)
    job = Job(load_recipe("quickstart", TINY), (Case.parse("tp=2"),))
    for difference, verdict in (
        (0.5, "equal"),
        (5.0, "equal up to rounding"),
        (500.0, "not equal"),
    ):
        calls.clear()
        differences = {kind: [Difference("step 1", difference, 1.0, 1000.0)] for kind in KINDS}
        passes = (Pass("tp=2", "fp32", differences),)
        report = make_report(Findings(job, small_recipe(), 2, "cpu", passes))
        assert report["layouts"][0]["verdict"] == verdict
        assert report["equal"] == (verdict != "not equal")
        assert calls == ([] if verdict == "equal" else ["fp32"])
