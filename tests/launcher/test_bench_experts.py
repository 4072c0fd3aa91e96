"""`bench experts` and `bench moe --nproc`: even loads, exchanges, arithmetic, and tiny runs."""

import time

import pytest
import torch

from colonnade.bench import bench, experts, hosts, moe_ranks
from colonnade.bench.experts import PATTERN, ExpertRow, ExpertShape, LocalExchange
from colonnade.bench.overlap import DelayGroup, RowTimer, delayed_world
from colonnade.bench.row import RANKS, VARIANTS
from colonnade.launcher.errors import UserError
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.cost import ExpertTraffic

TINY = ExpertShape(repeat=2, hidden=128, seq=64)


def bytes_by_formula(shape: ExpertShape) -> int:
    """The bytes that a rank sends in a step."""
    traffic = ExpertTraffic(shape.model(PATTERN), ParallelConfig(ep=RANKS), number=4)
    return shape.repeat * traffic.even_bytes(shape.seq * shape.batch, experts.TOP_K)


def test_choices_by_number_are_even_and_distinct() -> None:
    chosen = experts.even_choices(torch.empty(6, 2, 2), experts=4)
    assert chosen.flatten().bincount().tolist() == [6] * 4
    assert (chosen[..., 0] != chosen[..., 1]).all()


def test_both_halves_of_attention_last_as_long_if_scores_run_at_half_speed() -> None:
    for shape in (experts.BETWEEN_HOSTS, experts.ON_CPU, experts.ON_GPU):
        c = shape.model(PATTERN)
        queries, keys = (heads * c.head_dim for heads in (c.heads, c.kv_heads))
        products = c.hidden * (queries + 2 * keys)
        scores = shape.seq * queries  # q k and p v, over half of the tokens on average
        assert products == c.hidden * queries + 2 * scores


def test_a_delayed_all_to_all_repeats_the_rows_for_this_rank() -> None:
    group, rows = DelayGroup(1, 2), torch.arange(5.0)[:, None]
    group.seconds, received = 0.05, torch.empty(4, 1)
    start = time.perf_counter()
    work = group.alltoall_base(received, rows, [2, 2], [3, 2])
    counts = torch.empty(2, dtype=torch.int64)
    group.alltoall_base(counts, torch.tensor([7, 8]), [1, 1], [1, 1])
    work.wait()
    assert time.perf_counter() - start >= 0.05
    assert received.flatten().tolist() == [3.0, 4.0] * 2
    assert counts.tolist() == [8, 8]
    assert group.calls == 1  # the numbers take no time


def test_every_all_to_all_of_the_row_is_delayed() -> None:
    """A mixture launches two forward and two backward; an exchange that sends nothing, none."""
    device = torch.device("cpu")
    with delayed_world(device) as world:
        row = ExpertRow(TINY, world)
        group = row.exchange.group
        assert isinstance(group, DelayGroup)
        timer = RowTimer(row, group, device)
        for variant in VARIANTS:
            group.calls, timer.delay = 0, 0.01
            sample = timer.step(variant)
            assert group.calls == 4 * TINY.repeat
            if variant == "standard":
                assert min(sample.forward, sample.backward) >= 2 * TINY.repeat * timer.delay
        group.calls = 0
        row.rewire("standard", row.local_exchange)
        output = row.forward()
        row.backward(output)
        assert group.calls == 0
        assert output.shape == row.stream.shape
        assert all(p.grad is not None for p in row.wiring.parameters())


def test_the_local_exchange_refuses_uneven_loads() -> None:
    local = object.__new__(LocalExchange)
    rows = torch.ones(3, 1)
    assert local.exchange(rows, [1, 2], [1, 2]) is rows
    with pytest.raises(AssertionError):
        local.exchange(rows, [1, 2], [2, 1])


def test_ranks_send_what_the_formula_says_and_otherwise_nothing() -> None:
    if hosts.unsupported_reason() is not None:
        pytest.skip("needs two simulated hosts")
    with hosts.Hosts(experts.ExpertRank) as pair:
        pair.call("build", TINY)
        for variant in VARIANTS:  # warms up
            pair.call("step", variant)
        sent = {v: max(s.bytes_sent for s in pair.call("step", v)) for v in VARIANTS}
    for variant in ("standard", "ladder"):  # headers and acknowledgements come on top
        assert 1 < (sent[variant] - sent["none"]) / bytes_by_formula(TINY) < 1.2
    assert sent["none"] < sent["standard"] / 10


def test_a_tiny_run_has_figures() -> None:
    report = experts.run(TINY, TINY, host_rounds=1, delay_rounds=1)
    modes = ["delays", "between hosts"]
    if hosts.unsupported_reason() is not None:
        assert report["between hosts"].startswith("not measured: ")
        modes.remove("between hosts")
    for mode in modes:
        assert report[f"{mode}: forward, bound by the ends"] == 1 - 1 / TINY.blocks
        assert f"{mode}: forward, second half of attention / all-to-all" in report
        for direction in ("forward", "backward"):
            assert all(report[f"{mode}: {direction}, {variant} ms"] > 0 for variant in VARIANTS)


def test_shares_are_of_the_sum_of_the_parts() -> None:
    names = (*moe_ranks.PARTS, "nothing sent, dispatch", "nothing sent, combine", "undivided")
    seconds = {name: [1.0] for name in names}
    seconds |= {"products": [5.0], "bare all-to-alls": [0.5]}
    seconds |= {"experts' MLPs": [4.0], "one dense MLP": [3.0]}
    figures = moe_ranks.figures(seconds, bytes_sent=10**6)
    assert figures["share of dispatch and combine"] == 2 / 8
    assert figures["floor of the share, bare all-to-alls"] == 0.5 / 8
    assert figures["bare all-to-alls, MB/s"] == 2
    assert figures["speed, experts' MLPs / one dense MLP"] == 3 / 4


def test_a_mixture_on_two_ranks_has_figures(preloaded_workers: None) -> None:
    report = moe_ranks.run(2, sizes=((64, 16, 32),), rounds=1)
    size = "T=64 D=16 F=32"
    assert 0 < report[f"{size}: share of dispatch and combine"] < 1
    for part in (*moe_ranks.PARTS, "undivided", "bare all-to-alls", "one dense MLP"):
        assert report[f"{size}: {part} ms"] > 0
    sent = 4 * 64 * 2 * 16 * 4 // 2 + 8 * 4  # rows and their gradients, and counts
    assert report[f"{size}: MB that a rank sends"] == pytest.approx(1e-6 * sent)


def test_a_wrong_number_of_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="8 experts do not divide among them"):
        bench("moe", nproc=3)
    with pytest.raises(UserError, match="bench ladder sets its number of ranks itself"):
        bench("ladder", nproc=2)
