"""`verify` tells rounding from a fault: the noise of one process, and what follows from it."""

from unittest.mock import patch

import pytest
import torch
from ranks import Ranks
from test_verify import LAYOUTS, TINY, here, reference, shown, small_recipe

from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify import run
from colonnade.launcher.verify.equal import EXACT, FACTOR, Difference, compare
from colonnade.launcher.verify.judgement import Pass, beside, judge
from colonnade.launcher.verify.layouts import parse_layout
from colonnade.launcher.verify.rounding import ULP, Noise, noise
from colonnade.launcher.verify.run import Findings, Job, reported
from colonnade.launcher.verify.shrink import alone, on_layout, shrink
from colonnade.launcher.verify.trace import KINDS, Trace, traced
from colonnade.parallel import engine
from colonnade.parallel.world import World


def test_steps_start_from_the_reference(ranks1: Ranks, ranks2: Ranks) -> None:
    """On every layout: a gradient at step 2 is that of the weights given, whatever step 1 left."""
    (exact,) = ranks1.run(reference)
    starts = {name: t + 0.1 for name, t in exact.parameters.items()}
    (expected,) = ranks1.run(restarted, None, starts)
    chained = compare(exact.gradients, expected.gradients)
    assert {d.name[:6] for d in chained if d.excess > 1} == {"step 2", "step 3"}
    for layout in LAYOUTS:
        found = ranks2.run(restarted, layout, starts)[0]
        for kind in KINDS:
            worst = compare(getattr(found, kind), getattr(expected, kind), EXACT, found.apart)[0]
            assert worst.excess <= 1, worst


def restarted(rank: int, size: int, layout: str | None, starts: dict[str, torch.Tensor]) -> Trace:
    small = small_recipe()
    recipe = on_layout(small, size, parse_layout(layout), "fp64") if layout else alone(small)
    return traced(recipe, here(rank, size), starts)


# Narrow delta rules in a row: norms over two channels amplify rounding by 10,000 times and more.
SHAKY = [
    "model.pattern=DD", "model.residual=", "model.norm_position=both", "model.hidden=32",
    "model.delta_key_dim=2", "model.delta_heads=2", "model.delta_value_dim=2",
    "model.delta_chunk=2", "model.delta_negative=true", "train.seed=3",
    *(f"model.{name}=" for name in ("heads", "kv_heads", "ffn", "mamba_head_dim", "mamba_state",
                                    "mamba_chunk", "experts", "top_k", "expert_ffn")),
]  # fmt: skip


def shaky() -> Recipe:
    return shrink(load_recipe("quickstart", SHAKY), 2, [parse_layout(LAYOUTS[0])])


def shaky_reference(rank: int, size: int) -> Trace:
    return traced(alone(shaky()), here(rank, size))


def shaky_noise(rank: int, size: int, precision: str) -> Noise:
    return noise(shaky(), precision, here(rank, size))


def shaky_ranks(rank: int, size: int, exact: Trace, precision: str, broken: bool) -> Trace:
    recipe = on_layout(shaky(), size, parse_layout(LAYOUTS[0]), precision)
    complete = (lambda model, mesh: None) if broken else engine.complete_gradients
    with patch.object(engine, "complete_gradients", complete):
        return traced(recipe, here(rank, size), exact.parameters)


def test_rounding_is_told_from_a_fault(ranks1: Ranks, ranks2: Ranks) -> None:
    """An ill-conditioned recipe: beyond the bound it is equal up to rounding, and still a missing
    reduction is found in either precision, each without the other.
    """
    (exact,) = ranks1.run(shaky_reference)
    moved = {precision: ranks1.run(shaky_noise, precision)[0] for precision in ULP}

    def found(broken: bool) -> list[Pass]:
        return [
            beside(LAYOUTS[0], p, ranks2.run(shaky_ranks, exact, p, broken)[0], exact) for p in ULP
        ]

    right = found(broken=False)
    assert [one.exceeds for one in right] == [False, True]
    fp64, fp32 = judge(right, moved)
    assert (fp64["verdict"], fp32["verdict"]) == ("equal", "equal up to rounding")
    assert fp32["equal"]
    assert fp64["amplification"] is None
    assert fp32["amplification"] > 1000
    part = fp32["compared"]["gradients"]
    assert part["rounding"] > 0
    assert part["allowed"] < part["difference"] < FACTOR * part["noise"]
    lines = shown(fp64, fp32)
    assert any(line.startswith("  equal up to rounding: ") for line in lines)
    assert "; rounding alone moves it by" in "".join(lines)
    assert lines[-1] == f"equal: 1 layout, up to rounding: {LAYOUTS[0]} in fp32"

    for one in found(broken=True):
        (result,) = judge([one], moved)
        assert result["verdict"] == "not equal"
        assert result["compared"]["gradients"]["worst"].startswith("step 1: ")


def test_noise_grows_with_the_ulp(ranks1: Ranks) -> None:
    """It is proportional, but for the rounding of fp64 itself, of which an ulp is no multiple."""
    exact, coarse = (ranks1.run(well_conditioned, precision)[0] for precision in ULP)
    assert exact.keys() == coarse.keys() == KINDS.keys()
    ratio = [coarse["gradients"][n] / far for n, far in exact["gradients"].items() if far > 1e-16]
    middle = sorted(ratio)[len(ratio) // 2] / (ULP["fp32"] / ULP["fp64"])
    assert 0.25 < middle < 4


def well_conditioned(rank: int, size: int, precision: str) -> Noise:
    return noise(small_recipe(), precision, here(rank, size))


@pytest.mark.parametrize(
    ("difference", "moved", "judgement"),
    [
        (1.0, 0.0, "equal"),
        (1.1, 0.0, "unequal"),
        (1.1, 0.01, "rounding"),
        (1.0 + FACTOR, 1.0, "rounding"),
        (1.1 + FACTOR, 1.0, "unequal"),
        (1.1, 1000.0, "lost"),  # of 1000: a fault could hide in it
        (float("inf"), float("inf"), "lost"),
    ],
)
def test_judgement(difference: float, moved: float, judgement: str) -> None:
    """The difference of a tensor of 1000 that may differ by 1, beside its noise."""
    assert Difference("a", difference, 1.0, 1000.0, noise=moved).judgement == judgement


def test_what_tells_nothing_needs_another_proof() -> None:
    """A tensor lost in rounding in fp32 is accepted if fp64 finds the layout equal, else not."""

    def one(precision: str, far: float) -> Pass:
        found = {kind: [Difference("step 1: a", 0.0, 1.0, 10.0)] for kind in KINDS}
        return Pass("tp=2", precision, found | {"norms": [Difference("step 1", far, 1.0, 10.0)]})

    moved = {p: {kind: {"step 1": 9.0, "step 1: a": 0.0} for kind in KINDS} for p in ULP}
    lost = one("fp32", 5.0)
    assert judge([one("fp64", 0.5), lost], moved)[1]["verdict"] == "equal up to rounding"
    for passes in ([lost], [one("fp64", 5.0), lost]):
        result = judge(passes, moved)[-1]
        assert result["verdict"] == "not equal"
        assert "so that fp32 tells nothing of it; try another train.seed, or " in shown(result)[-3]


def test_where_nothing_exceeds_nothing_more_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where something does, the process that reports trains alone, and says so."""
    calls: list[str] = []

    def measured(small: Recipe, precision: str, world: World) -> Noise:
        calls.append(precision)
        return {kind: {"step 1": 1.0} for kind in KINDS}

    monkeypatch.setattr(run, "noise", measured)
    job = Job(load_recipe("quickstart", TINY), (parse_layout("tp=2"),))
    for far, verdict in ((0.5, "equal"), (5.0, "equal up to rounding"), (500.0, "not equal")):
        calls.clear()
        found = {kind: [Difference("step 1", far, 1.0, 1000.0)] for kind in KINDS}
        report = reported(Findings(job, small_recipe(), 2, "cpu", (Pass("tp=2", "fp32", found),)))
        assert report["layouts"][0]["verdict"] == verdict
        assert report["equal"] == (verdict != "not equal")
        assert calls == ([] if verdict == "equal" else ["fp32"])
