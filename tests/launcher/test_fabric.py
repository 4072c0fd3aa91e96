"""What `doctor --cluster` measures, and what it makes of it."""

import json
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import pool

from colonnade.launcher.cli import main
from colonnade.launcher.cluster.fabric import findings, picture
from colonnade.launcher.cluster.fabric.clock import Exchange, Skew, skew
from colonnade.launcher.cluster.fabric.health import Gpu, Rates, gpu_faults, gpus, measure_rates
from colonnade.launcher.cluster.fabric.links import Link, Meter, measure_links
from colonnade.launcher.cluster.fabric.reach import failures, listening_socket, sentences
from colonnade.launcher.cluster.fabric.table import table
from colonnade.launcher.cluster.fabric.tournament import rounds_of, tournament
from colonnade.launcher.cluster.facts import Facts, hosts_of
from colonnade.launcher.cluster.gather import StoreGather
from colonnade.launcher.cluster.network import Attachment, Network
from colonnade.launcher.errors import UserError

Links = dict[tuple[int, int], Link]
FAST, SLOW = 1e9, 3e7  # bytes per second
LEVEL = Skew(0.0, 1e-4)
CPU = torch.device("cpu")


# The tournament


@pytest.mark.parametrize("players", [0, 1, 2, 3, 4, 7, 8, 33])
def test_every_pair_meets_once_in_disjoint_rounds(players: int) -> None:
    rounds = tournament(players)
    pairs = Counter(pair for round_ in rounds for pair in round_)
    assert pairs == Counter(combinations(range(players), 2))
    for round_ in rounds:
        assert len({player for pair in round_ for player in pair}) == 2 * len(round_)
    assert len(rounds) <= players


def test_some_pairs_alone_keep_their_rounds() -> None:
    pairs = {(0, 1), (2, 5), (1, 4)}
    rounds = rounds_of(pairs, 6)
    assert {pair for round_ in rounds for pair in round_} == pairs
    assert all(rounds)
    assert rounds_of(set(), 6) == []


# Clocks


@pytest.mark.parametrize("offset", [-3_000_000_000, 0, 17, 5_000_000_000])
def test_the_skew_is_within_its_bound_whatever_the_way_there_and_back(offset: int) -> None:
    """Simulates exchanges with one-way delays that differ between both directions."""
    draws = torch.Generator().manual_seed(1)
    exchanges, now = [], 10**18
    for _ in range(50):
        to, work, back = torch.randint(1, 2_000_000, (3,), generator=draws).tolist()
        answered = now + to + work
        exchanges.append(Exchange(now, now + to + offset, answered + offset, answered + back))
        assert exchanges[-1].round_trip == to + back
        found = skew(exchanges[-1:])
        assert abs(found.seconds - offset * 1e-9) <= found.bound + 1e-12
        now += 10_000_000
    found = skew(exchanges)
    assert found.bound == min(skew([exchange]).bound for exchange in exchanges)
    assert found.reversed().seconds == -found.seconds


def test_a_symmetric_exchange_gives_the_exact_skew() -> None:
    assert skew([Exchange(100, 5150, 5170, 220)]) == Skew(5000 * 1e-9, 50 * 1e-9)


def test_a_skew_is_certain_beyond_its_bound() -> None:
    assert Skew(-3.0, 1.0).at_least == 2.0
    assert Skew(0.5, 1.0).at_least == 0.0


def links_of(members: int, of: Callable[[int, int], tuple[float, float]]) -> Links:
    """Links of all pairs, with the bandwidths that `of` gives for both directions."""
    return {(a, b): Link(a, b, *of(a, b), 1e-4, LEVEL) for a, b in combinations(range(members), 2)}


def with_clocks(clocks: list[float]) -> Links:
    """Links between members whose clocks are ahead by these seconds."""
    return {
        (a, b): Link(a, b, FAST, FAST, 1e-4, Skew(clocks[b] - clocks[a], 1e-4))
        for a, b in combinations(range(len(clocks)), 2)
    }


def test_the_host_whose_clock_is_off_is_named_not_those_that_agree() -> None:
    names = ["n1", "n2", "n3", "n4"]
    assert findings.clock_faults(with_clocks([0.0, 0.4, -0.3, 0.5]), names) == []
    for wrong in range(4):
        clocks = [0.1 * n for n in range(4)]
        clocks[wrong] = -7.0
        (fault,) = findings.clock_faults(with_clocks(clocks), names)
        assert fault.startswith(f"the clock of n{wrong + 1} is 7.")
        assert "behind" in fault
    (fault,) = findings.clock_faults(with_clocks([0.0, 5.0]), names[:2])
    assert fault.startswith("the clock of n2 is 5.0 s (± 0.1 ms) ahead of that of n1")
    assert findings.clock_faults({}, ["n1"]) == []


# Links


def link_faults(links: Links, members: int, speed: int | None = None) -> list[str]:
    names = [f"n{n + 1}" for n in range(members)]
    return findings.link_faults(links, names, [speed] * members)


@pytest.mark.parametrize("members", [3, 4, 9])
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_slow_host_is_named_with_its_factor(members: int, slow: int) -> None:
    links = links_of(members, lambda a, b: (SLOW, SLOW) if slow in (a, b) else (FAST, FAST))
    (fault,) = link_faults(links, members)
    assert fault.startswith(f"n{slow + 1} is slow: 30 MB/s with the others (median)")
    assert "1.0 GB/s, 33.3 times" in fault
    doubtful = findings.doubtful_pairs(links, [None] * members)
    assert doubtful == {pair for pair in links if slow in pair}


def test_a_host_that_only_sends_slowly_is_slow() -> None:
    links = links_of(4, lambda a, b: (SLOW if a == 1 else FAST, SLOW if b == 1 else FAST))
    assert [fault.split(":")[0] for fault in link_faults(links, 4)] == ["n2 is slow"]


def test_a_slow_pair_is_named_where_no_host_is() -> None:
    links = links_of(5, lambda a, b: (SLOW, SLOW) if (a, b) == (1, 3) else (FAST, FAST))
    assert link_faults(links, 5) == [
        "links are slower than the usual 1.0 GB/s: 30 MB/s between n2 and n4"
    ]
    assert findings.doubtful_pairs(links, [None] * 5) == {(1, 3)}


def test_a_slow_direction_is_named() -> None:
    (fault,) = link_faults(links_of(2, lambda a, b: (FAST, SLOW)), 2)
    assert fault == "links are slow in one direction: 30 MB/s from n2 to n1, 1.0 GB/s back"


@pytest.mark.parametrize(("speed", "wrong"), [(10_000, True), (100_000, True), (1000, False)])
def test_two_hosts_are_compared_with_their_links(speed: int, wrong: bool) -> None:
    links = links_of(2, lambda a, b: (SLOW, SLOW))
    faults = link_faults(links, 2, speed)
    assert faults == (
        [f"links are far slower than their speed: 30 MB/s of {speed // 1000} Gbit/s between n1 "
         "and n2"]
        if wrong else []
    )  # fmt: skip
    assert bool(findings.doubtful_pairs(links, [speed] * 2)) == wrong
    assert link_faults(links, 2) == []  # nothing to compare with


def test_links_within_a_factor_of_each_other_are_in_order() -> None:
    draws = torch.Generator().manual_seed(2)
    for members in (2, 3, 8):
        figures = (FAST * (1 + 0.6 * torch.rand(200, generator=draws))).tolist()
        links = links_of(members, lambda a, b, f=figures: (f.pop(), f.pop()))
        assert link_faults(links, members, 10_000) == []
        assert findings.doubtful_pairs(links, [10_000] * members) == set()


def test_a_second_measurement_keeps_the_better_figures() -> None:
    a = Link(0, 1, 5.0, 2.0, 0.3, Skew(1.0, 0.2))
    b = Link(0, 1, 4.0, 3.0, 0.1, Skew(2.0, 0.4))
    assert a.merged(b) == b.merged(a) == Link(0, 1, 5.0, 3.0, 0.1, Skew(1.0, 0.2))


def measured(rank: int, size: int) -> tuple[dict, int]:
    """Measures all pairs; counts what this rank sends."""
    sent = 0
    plain = Meter._send

    def counted(meter: Meter, tensor: torch.Tensor) -> None:
        nonlocal sent
        sent += 1
        plain(meter, tensor)

    Meter._send = counted  # type: ignore[method-assign]
    try:
        links = measure_links(tournament(size), list(range(size)), CPU)
    finally:
        Meter._send = plain  # type: ignore[method-assign]
    return links, sent


def test_ranks_measure_all_pairs_and_agree() -> None:
    results = pool(3).run(measured)
    links = results[0][0]
    assert all(found == links for found, _ in results)
    assert sorted(links) == [(0, 1), (0, 2), (1, 2)]
    for pair, link in links.items():
        assert (link.first, link.second) == pair
        assert min(link.forward, link.backward, link.latency, link.skew.bound) > 0
        assert abs(link.skew.seconds) <= link.skew.bound  # all have one clock
    assert all(sent > 2 * 20 for _, sent in results)  # pings of two pairs


def delayed_pair(rank: int, size: int, ahead: int, pause: float) -> Link | None:
    """Measures a pair whose second end has a clock that is `ahead` ns, and pauses before it sends
    a message of more than one element."""
    meter = Meter(1 - rank, rank == 0, CPU, lambda: time.time_ns() + ahead * rank)
    plain = meter._send

    def paused(tensor: torch.Tensor) -> None:
        if rank == 1 and len(tensor) > 1:
            time.sleep(pause)
        plain(tensor)

    meter._send = paused  # type: ignore[method-assign]
    if rank == 0:
        return meter.link(0, 1)
    meter.answer()
    return None


def test_a_pair_finds_the_other_clock_and_the_slow_direction() -> None:
    link, _ = pool(2).run(delayed_pair, 5_000_000_000, 0.05)
    assert link is not None
    assert abs(link.skew.seconds - 5) <= link.skew.bound
    assert link.backward < 64 * 2**20 / 0.05
    assert link.backward * 2 < link.forward


# Processors


def facts_with(devices: list[str], device_type: str = "cuda") -> list[Facts]:
    network = Network(Attachment("eth0", "10.0.0.1/24", None))
    return [
        Facts(rank, 0, f"n{rank}", f"boot{rank}", device, device_type, network, {}, {})
        for rank, device in enumerate(devices)
    ]


def test_a_slow_gpu_is_named_among_those_of_its_model() -> None:
    facts = facts_with(["H100", "H100", "H100", "A100"])
    rates = {rank: Rates(7e14, 3e12, 5e10) for rank in range(3)} | {3: Rates(2e14, 1e12, 2e10)}
    names = [f"rank {rank}" for rank in range(4)]
    assert findings.rate_faults(rates, facts, names) == []
    rates[1] = Rates(5e14, 3e12, 1e10)
    assert findings.rate_faults(rates, facts, names) == [
        "rank 1 is slow in matrix products: 500 TFLOP/s, while the others reach 700 TFLOP/s "
        "(median)",
        "rank 1 is slow in copies from the host: 10.0 GB/s, while the others reach 50.0 GB/s "
        "(median)",
    ]
    assert rates[1].merged(rates[0]) == rates[0]


def test_a_slow_cpu_is_named_by_its_products_alone() -> None:
    facts = facts_with(["EPYC"] * 3, "cpu")
    rates = {0: Rates(3e10, 1e9), 1: Rates(2e10, 1e10), 2: Rates(3e10, 1e10)}
    names = ["n1", "n2", "n3"]
    assert findings.rate_faults(rates, facts, names) == []
    rates[1] = Rates(1e10, 1e10)
    (fault,) = findings.rate_faults(rates, facts, names)
    assert fault.startswith("n2 is slow in matrix products: 10 GFLOP/s")


def test_a_cpu_has_rates() -> None:
    rates = measure_rates(CPU)
    assert rates.product > 1e8
    assert rates.copy > 1e7
    assert rates.from_host is None


def test_hosts_with_another_number_of_ranks_are_named() -> None:
    facts = facts_with(["H100"] * 4)
    assert findings.crowded_faults(hosts_of(facts)) == []
    twin = Facts(4, 1, "n2", "boot2", "H100", "cuda", facts[0].network, {}, {})
    assert findings.crowded_faults(hosts_of([*facts, twin])) == [
        "hosts differ in their number of ranks: most have 1, but n2 (2)"
    ]


def smi(folder: Path, script: str) -> str:
    """A program that stands for nvidia-smi."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_nvidia_smi_is_read(tmp_path: Path) -> None:
    lines = """0, NVIDIA H100 80GB HBM3, 41, 0, 0x0000000000000004, 16, 16
1, NVIDIA H100 80GB HBM3, 88, 3, 0x0000000000000064, 8, 16
2, NVIDIA GeForce, 50, [N/A], [N/A], [Not Supported], 16"""
    found, failure = gpus(smi(tmp_path, f"cat <<'END'\n{lines}\nEND"))
    assert not failure
    assert found[2] == Gpu(2, "NVIDIA GeForce", 50, None, (), None, 16)
    faults = gpu_faults("n1", found, failure)
    assert [fault.split(":")[0] for fault in faults] == [
        "GPU 1 of n1 has 3 uncorrected memory errors",
        "GPU 1 of n1 lowers its clocks at 88 °C",
        "GPU 1 of n1 uses 8 of 16 PCIe lanes",
    ]
    assert faults[1].endswith(": too hot (software), too hot (hardware)")


def test_newer_names_of_fields_and_failures_of_nvidia_smi(tmp_path: Path) -> None:
    newer = """case "$1" in
*throttle_reasons*) echo 'Field "clocks_throttle_reasons.active" is not a valid field to query.'
    exit 2;;
esac
echo '0, H300, 41, 0, 0x0000000000000008, 16, 16'"""
    found, failure = gpus(smi(tmp_path, newer))
    assert not failure
    assert found[0].throttled == ("hardware slowdown",)
    found, failure = gpus(smi(tmp_path, "echo 'Driver/library version mismatch' >&2; exit 18"))
    assert gpu_faults("n1", found, failure) == [
        "nvidia-smi fails on n1: Driver/library version mismatch"
    ]
    assert gpus(str(tmp_path / "none")) == ([], "")


# Who reaches whom, and the exchange before there is a group


def test_connections_that_fail_are_told() -> None:
    with listening_socket("127.0.0.1", 2) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but not listening
        found = failures({"n1": server.getsockname(), "n2": closed.getsockname()})
    assert found == {"n2": os.strerror(111)}
    with pytest.raises(UserError, match="cannot listen on its address 198"):
        listening_socket("198.51.100.77", 2)


def test_sentences_say_who_is_not_reached_by_whom() -> None:
    addresses = {"n1": "10.0.0.1", "n2": "10.0.0.2", "n3": "10.0.0.3"}
    found = {"n1": {"n3": "timed out"}, "n2": {"n1": "refused", "n3": "timed out"}, "n3": {}}
    said = sentences(addresses, found)
    assert [sentence.split(":")[0] for sentence in said] == [
        "n2 cannot reach n1 at 10.0.0.1 (refused)",
        "no other host reaches n3 at 10.0.0.3 (timed out)",
    ]


def gathered(size: int, actions: list[Callable[[], Any]], patience: float = 60.0) -> list[Any]:
    """Calls StoreGather in as many threads as there are actions; returns results or errors."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results: list[Any] = [None] * len(actions)

    def act(rank: int) -> None:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        try:
            with StoreGather(own, rank, size, patience) as gather:
                results[rank] = [gather(actions[rank]), gather(lambda: rank)]
        except UserError as mistake:
            results[rank] = str(mistake)

    threads = [threading.Thread(target=act, args=(rank,)) for rank in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def refuse() -> None:
    raise UserError("no such interface")


def test_the_store_gathers_values_and_mistakes() -> None:
    assert gathered(2, [lambda: "a", lambda: {"b": 1}]) == [[["a", {"b": 1}], [0, 1]]] * 2
    assert gathered(2, [lambda: "a", refuse]) == ["no such interface"] * 2


def test_a_silent_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colonnade.launcher.cluster.gather.LEAVING", 0.1)
    (told,) = gathered(3, [lambda: "a"], patience=0.2)
    assert told.startswith("ranks 1, 2 have not reported in 0.2 s")


# The report


def report_of(links: Links, faults: list[str]) -> dict[str, Any]:
    names = [f"n{n + 1}" for n in range(max(b for _, b in links) + 1)]
    return {
        "hosts": [
            {"host": name, "ranks": [2 * n, 2 * n + 1], "device": "EPYC", "interface": "eth0",
             "address": f"10.0.0.{n + 1}/24", "speed": 10_000}
            for n, name in enumerate(names)
        ],
        "rates": [{"rank": 2 * n, "product": 3e10} for n in range(len(names))],
        "links": [
            {"first": names[k.first], "second": names[k.second], "bytes_per_s": k.forward,
             "bytes_per_s_back": k.backward, "latency_s": k.latency, "skew_s": k.skew.seconds,
             "skew_bound_s": k.skew.bound}
            for k in links.values()
        ],
        "gpus": [], "faults": faults, "notes": ["n"], "seconds": 1.5,
    }  # fmt: skip


def test_the_table_has_rows_that_send_and_columns_that_receive() -> None:
    links = links_of(3, lambda a, b: ((10 * a + b) * 1e6, (10 * b + a) * 1e6))
    text = table(report_of(links, []))
    assert "n2        10 MB/s           12 MB/s" in text
    assert "+0 µs ± 0.1 ms" in text
    assert text.endswith("note: n\nnothing is wrong (1.5 s)")
    text = table(report_of(links, ["n1 is slow"]))
    assert text.endswith("wrong: n1 is slow\nnote: n")


def test_the_table_of_many_hosts_shows_the_slowest_pairs() -> None:
    links = links_of(12, lambda a, b: (FAST, SLOW if (a, b) == (3, 7) else FAST))
    lines = table(report_of(links, [])).splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("slowest pairs"))
    assert lines[head + 1].split() == ["n4", "n8", "1.0", "GB/s", "30", "MB/s", "0.1", "ms"]


@pytest.mark.parametrize("name", ["fabric.png", "fabric.svg"])
def test_the_picture_is_drawn(tmp_path: Path, name: str) -> None:
    links = links_of(3, lambda a, b: ((10 * a + b) * 1e6, (10 * b + a) * 1e6))
    report = report_of(links, ["n1 is slow"])
    names, bandwidth, latency = picture.matrices(report)
    assert names == ["n1", "n2", "n3"]
    assert bandwidth[2, 1] == 21e6
    assert bandwidth[1, 2] == 12e6
    assert latency[0, 2] == latency[2, 0] == 1e-4
    picture.draw(report, str(tmp_path / name))
    begin = (tmp_path / name).read_bytes()[:5]
    assert begin in (b"\x89PNG\r", b"<?xml")


def test_a_picture_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, message in {"a.pdf": "ends in .png or .svg", "no/a.png": "does not exist"}.items():
        assert main(["doctor", "--cluster", "--nproc", "2", "--picture", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(picture, "pyplot", lambda: None)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        picture.check_picture(str(tmp_path / "a.png"))


def test_options_of_the_cluster_are_refused_without_it(capsys: pytest.CaptureFixture) -> None:
    for options in (["--nproc", "2"], ["--picture", "a.png"]):
        assert main(["doctor", *options]) == 2
        assert f"doctor {options[0]} is for --cluster" in capsys.readouterr().err


def test_one_host_measures_its_ranks(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path, drawn = tmp_path / "report.json", tmp_path / "fabric.png"
    status = main(
        ["doctor", "--cluster", "--nproc", "2", "--json", str(path), "--picture", str(drawn)]
    )
    report = json.loads(path.read_text(encoding="utf-8"))
    assert status == (1 if report["faults"] else 0)
    assert [(k["first"], k["second"]) for k in report["links"]] == [("rank 0", "rank 1")]
    assert report["hosts"][0]["ranks"] == [0, 1]
    assert [fact["rank"] for fact in report["ranks"]] == [0, 1]
    assert drawn.stat().st_size > 1000
    assert "all pairs of 2 ranks in 1 rounds" in capfd.readouterr().err
