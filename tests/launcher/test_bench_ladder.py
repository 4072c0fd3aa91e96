"""`bench ladder`: its arithmetic, its message where it cannot run, a tiny run where it can."""

import shutil
from pathlib import Path

import pytest
import torch

from colonnade.bench import bench, hosts, ladder
from colonnade.bench.ladder import VARIANTS, Rounds, Sample, Shape
from colonnade.launcher.errors import UserError


def sample(forward: float, backward: float, cpu: tuple[float, float] = (0.0, 0.0)) -> Sample:
    return Sample(forward, backward, *cpu, machine_cpu=0.0, bytes_sent=0)


ROUNDS: Rounds = {  # one round of each variant; the second rank is the slower one
    "none": [[sample(0.9, 2.0, (1.0, 2.0)), sample(1.0, 2.0, (1.0, 2.0))]],
    "standard": [[sample(1.5, 2.5, (1.1, 2.0)), sample(2.0, 3.0, (1.1, 2.2))]],
    "ladder": [[sample(1.0, 2.1), sample(1.25, 2.1)]],
}


def test_the_first_rate_is_that_of_a_link_without_overhead() -> None:
    rate = ladder.link_rate(share=0.25, compute_seconds=3.0, bytes_sent=200.0)
    communication = 200.0 / rate
    assert communication / (3.0 + communication) == pytest.approx(0.25)


def test_a_step_with_overhead_leads_to_the_wanted_share() -> None:
    compute, bytes_sent, overhead, share = 3.0, 200.0, 1.4, 0.3
    rate = ladder.link_rate(share, compute, bytes_sent)
    standard = compute + overhead * bytes_sent / rate
    rate = ladder.corrected_rate(rate, share, compute, standard)
    communication = overhead * bytes_sent / rate
    assert communication / (compute + communication) == pytest.approx(share)


def test_hidden_is_what_ladder_saves_of_what_communication_costs() -> None:
    forward = ladder.overlap_figures(ROUNDS, "forward", blocks=16)
    assert forward["none ms"] == pytest.approx(1000)
    assert forward["hidden"] == pytest.approx(0.75)
    assert forward["bound by the ends"] == 15 / 16
    assert forward["processor ms of communication"] == pytest.approx(100)
    assert forward["bound by the ends and the processor"] == pytest.approx(15 / 16 - 0.1)
    backward = ladder.overlap_figures(ROUNDS, "backward", blocks=16)
    assert backward["hidden"] == pytest.approx(0.9)


def test_a_report_has_both_directions_and_the_step() -> None:
    figures = ladder.case_figures(ROUNDS, blocks=16)
    assert figures["communication / standard step"] == pytest.approx(2 / 5)
    assert figures["step, standard / ladder"] == pytest.approx(5 / 3.35)
    assert {"forward, hidden", "backward, hidden", "backward, ladder ms"} <= figures.keys()


def test_local_seams_have_the_shapes_of_the_collectives() -> None:
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gathered = ladder._LocalAllGather.apply(x)
    gathered.backward(torch.ones_like(gathered))
    assert gathered.shape == (6, 2, 4)
    assert x.grad is not None
    h = gathered.detach().requires_grad_()
    scattered = ladder._LocalReduceScatter.apply(h)
    scattered.backward(torch.ones_like(scattered))
    assert torch.equal(scattered, x)
    assert h.grad is not None
    assert h.grad.shape == h.shape


@pytest.mark.parametrize("tool", ["ip", "tc"])
def test_a_missing_tool_is_named(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "CAPABILITIES", {})
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else f"/bin/{name}")
    with pytest.raises(UserError, match=f"two hosts on this machine: `{tool}` is not installed"):
        bench("ladder")


def test_the_message_asks_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "CAPABILITIES", {"CAP_UNKNOWN": 63})
    with pytest.raises(UserError, match=r"run it as root \(this process lacks CAP_UNKNOWN\)"):
        bench("ladder")


def test_a_tiny_run_has_figures_and_a_failure_ends_all_processes() -> None:
    """Where this machine cannot simulate two hosts, the benchmark says so."""
    tiny = Shape(repeat=1, hidden=64, seq=32)
    if hosts.unsupported_reason() is not None:
        with pytest.raises(UserError, match="cannot simulate two hosts"):
            ladder.run(tiny, rounds=1)
        return
    with hosts.Hosts(ladder.Rank) as pair:
        for pattern, sequence in (("*-", True), ("M-", False)):
            figures = ladder.measure(pair, tiny, pattern, sequence, round_count=1, share=0.3)
            assert figures["MB that a rank sends"] > 0
            for direction in ("forward", "backward"):
                assert all(figures[f"{direction}, {variant} ms"] > 0 for variant in VARIANTS)
        pids = [process.pid for process in pair.processes]
        with pytest.raises(RuntimeError, match=r"host \d:(.|\n)*KeyError: 'nonsense'"):
            pair.call("step", "nonsense")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
