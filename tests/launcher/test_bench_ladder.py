"""`bench ladder`: its arithmetic, what it says where it cannot run, and a tiny run where it can."""

import shutil
from pathlib import Path

import pytest
import torch

from colonnade.bench import bench, hosts, ladder
from colonnade.bench.ladder import VARIANTS, Rounds, Sample, Shape
from colonnade.launcher.errors import UserError


def sample(forward: float, backward: float, work: tuple[float, float] = (0.0, 0.0)) -> Sample:
    return Sample(forward, backward, *work, machine_work=0.0, sent=0)


ROUNDS: Rounds = {  # of one round each, the second rank being the slower one
    "none": [[sample(0.9, 2.0, (1.0, 2.0)), sample(1.0, 2.0, (1.0, 2.0))]],
    "standard": [[sample(1.5, 2.5, (1.1, 2.0)), sample(2.0, 3.0, (1.1, 2.2))]],
    "ladder": [[sample(1.0, 2.1), sample(1.25, 2.1)]],
}


def test_the_first_rate_is_that_of_a_link_without_overhead() -> None:
    rate = ladder.rate_for(share=0.25, without=3.0, sent=200.0)
    communication = 200.0 / rate
    assert communication / (3.0 + communication) == pytest.approx(0.25)


def test_a_step_with_overhead_leads_to_the_wanted_share() -> None:
    without, sent, overhead, share = 3.0, 200.0, 1.4, 0.3
    rate = ladder.rate_for(share, without, sent)
    rate = ladder.corrected(rate, share, without, standard=without + overhead * sent / rate)
    communication = overhead * sent / rate
    assert communication / (without + communication) == pytest.approx(share)


def test_hidden_is_what_ladder_saves_of_what_communication_costs() -> None:
    forward = ladder.hidden(ROUNDS, "forward", blocks=16)
    assert forward["none ms"] == pytest.approx(1000)
    assert forward["hidden"] == pytest.approx(0.75)
    assert forward["bound by the ends"] == 15 / 16
    assert forward["processor ms of communication"] == pytest.approx(100)
    assert forward["bound by the ends and the processor"] == pytest.approx(15 / 16 - 0.1)
    assert ladder.hidden(ROUNDS, "backward", blocks=16)["hidden"] == pytest.approx(0.9)


def test_a_report_has_both_directions_and_the_step() -> None:
    figures = ladder.assemble(ROUNDS, blocks=16)
    assert figures["communication / standard step"] == pytest.approx(2 / 5)
    assert figures["step, standard / ladder"] == pytest.approx(5 / 3.35)
    assert {"forward, hidden", "backward, hidden", "backward, ladder ms"} <= figures.keys()


def test_without_communication_shapes_and_gradients_are_those_of_the_seams() -> None:
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gathered = ladder._Gather.apply(x)
    gathered.backward(torch.ones_like(gathered))
    assert gathered.shape == (6, 2, 4)
    assert x.grad is not None
    h = gathered.detach().requires_grad_()
    scattered = ladder._Scatter.apply(h)
    scattered.backward(torch.ones_like(scattered))
    assert torch.equal(scattered, x)
    assert h.grad is not None
    assert h.grad.shape == h.shape


@pytest.mark.parametrize("tool", ["ip", "tc"])
def test_a_missing_tool_is_named(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "NEEDED", {})
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else f"/bin/{name}")
    with pytest.raises(UserError, match=f"cannot be played on this machine: `{tool}` is not inst"):
        bench("ladder")


def test_it_says_that_it_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "NEEDED", {"CAP_OF_TOMORROW": 63})
    with pytest.raises(UserError, match=r"run it as root \(this process lacks CAP_OF_TOMORROW\)"):
        bench("ladder")


def test_a_tiny_run_has_figures_and_a_failure_leaves_nothing() -> None:
    """Where two hosts cannot be played, that the benchmark says so."""
    tiny = Shape(repeat=1, hidden=64, seq=32)
    if hosts.why_not() is not None:
        with pytest.raises(UserError, match="cannot be played"):
            ladder.run(tiny, rounds=1)
        return
    with hosts.Hosts(ladder.Rank) as both:
        for pattern, sequence in (("*-", True), ("M-", False)):
            figures = ladder.measure(both, tiny, pattern, sequence, rounds=1, share=0.3)
            assert figures["MB that a rank sends"] > 0
            for direction in ("forward", "backward"):
                assert all(figures[f"{direction}, {variant} ms"] > 0 for variant in VARIANTS)
        pids = [process.pid for process in both.processes]
        with pytest.raises(RuntimeError, match=r"host \d:(.|\n)*KeyError: 'nonsense'"):
            both.call("step", "nonsense")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
