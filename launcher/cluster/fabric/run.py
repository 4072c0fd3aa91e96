"""`doctor --cluster`: the order of its measurements, as every rank, and its report."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.fabric import findings
from colonnade.launcher.cluster.fabric.health import Gpu, Rates, gpu_faults, gpus, measure_rates
from colonnade.launcher.cluster.fabric.links import Link, measure_links, meet
from colonnade.launcher.cluster.fabric.reach import addresses_of, unreachable
from colonnade.launcher.cluster.fabric.tournament import Pair, rounds_of, tournament
from colonnade.launcher.cluster.facts import Facts, differences, facts_of_this_rank, hosts_of
from colonnade.launcher.cluster.gather import StoreGather
from colonnade.launcher.cluster.network import loopback_faults, network_findings
from colonnade.launcher.cluster.ranks import SINGLE_PROCESS, prepare_rank, start_ranks
from colonnade.launcher.cluster.rendezvous import open_store
from colonnade.launcher.errors import UserError
from colonnade.parallel.world import open_world

AGAIN = 2  # times that what looks slow is measured again
TIMEOUT = 600.0  # seconds that a rank waits for another one in a measurement
REPORT = "report.json"
ALONE = (
    "this is one process alone, so nothing was compared: start it as every rank, by srun or "
    "torchrun, or with --nproc"
)


@dataclass(frozen=True)
class Output:
    """What rank 0 does for the user. A UserError of it ends all ranks.

    Attributes:
        check: before anything is measured.
        show: with the report, while the others wait: a launcher may end all ranks with the first.
    """

    check: Callable[[], None] = lambda: None
    show: Callable[[dict[str, Any]], None] = lambda report: None


def cluster_doctor(nproc: int = 1, output: Output = Output()) -> dict[str, Any]:
    """Examines the hosts of the job that this process is a rank of, or `nproc` ranks of this host.

    Args:
        nproc: ranks to start where no launcher has started this process.
        output: what rank 0 checks and shows.

    Returns:
        the report, on every rank; `faults` has what is wrong, a sentence each.

    Raises:
        UserError: of `output`, --nproc under a launcher of ranks, or ranks that do not report.
    """
    environment = RankEnvironment.from_environment()
    if environment is not None and nproc > 1:
        raise UserError(
            f"--nproc {nproc}: this process is one of {environment.size} ranks that a launcher has "
            "started; leave --nproc out"
        )
    if environment is not None or nproc == 1:
        return examine(environment or SINGLE_PROCESS, output)
    output.check()
    with tempfile.TemporaryDirectory(prefix="colonnade-doctor-") as folder:
        if status := start_ranks(examine_as_started_rank, {"folder": folder}, nproc):
            raise SystemExit(status)
        report = json.loads(Path(folder, REPORT).read_text(encoding="utf-8"))
    output.show(report)
    return report


def examine_as_started_rank(folder: str) -> None:
    """Takes part as a rank that `cluster_doctor` started; rank 0 writes the report."""
    environment = RankEnvironment.from_environment()
    assert environment is not None
    report = examine(environment, Output())
    if environment.rank == 0:
        Path(folder, REPORT).write_text(json.dumps(report), encoding="utf-8")


@dataclass(frozen=True)
class Examined:
    """What ranks are measured: one of each host, or all where there is one host.

    Attributes:
        names: of hosts or ranks, for sentences.
        ranks: one for each name.
        speeds: of their interfaces in Mbit/s; None where it is unknown or not used.
    """

    names: list[str]
    ranks: list[int]
    speeds: list[int | None]

    @classmethod
    def of(cls, hosts: Mapping[str, Sequence[Facts]]) -> "Examined":
        """Chooses them from the ranks by host."""
        if len(hosts) > 1:
            firsts = [group[0] for group in hosts.values()]
            speeds = [fact.network.used.speed for fact in firsts]
            return cls(list(hosts), [fact.rank for fact in firsts], speeds)
        (group,) = hosts.values()
        ranks = [fact.rank for fact in group]
        return cls([f"rank {rank}" for rank in ranks], ranks, [None] * len(ranks))


def examine(environment: RankEnvironment, output: Output) -> dict[str, Any]:
    """Examines as one rank, and shows the report on rank 0."""
    start = time.perf_counter()
    device = prepare_rank(environment, "auto")
    rank, size = environment.rank, environment.size
    store = dist.HashStore() if size == 1 else open_store(environment)

    def tell() -> dict[str, Any]:
        if rank == 0:
            output.check()
        return facts_of_this_rank(environment, device).to_json()

    with StoreGather(dist.PrefixStore("colonnade-doctor", store), rank, size) as gather:
        facts = [Facts.from_json(value) for value in gather(tell)]
        hosts = hosts_of(facts)
        report = report_of_facts(facts, hosts)
        if blocked := unreached_hosts(hosts, rank, gather):
            report["faults"] += blocked
            report["notes"].append("nothing was measured: gloo would wait for what it cannot reach")
        else:
            measure(report, facts, hosts, environment, device, store)
        report["seconds"] = round(time.perf_counter() - start, 1)
        gather(lambda: output.show(report) if rank == 0 else None)
    return report


def unreached_hosts(
    hosts: Mapping[str, Sequence[Facts]], rank: int, gather: StoreGather
) -> list[str]:
    """Says which hosts others cannot reach, before gloo would wait for them. Collective."""
    if len(hosts) == 1:
        return []
    if faults := loopback_faults({host: group[0].network for host, group in hosts.items()}):
        return faults
    stands_for = next((h for h, group in hosts.items() if group[0].rank == rank), None)
    return unreachable(addresses_of(hosts), stands_for, gather)


def report_of_facts(facts: Sequence[Facts], hosts: Mapping[str, Sequence[Facts]]) -> dict[str, Any]:
    """Begins the report with what needs no measurement."""
    faults, notes = network_findings({host: group[0].network for host, group in hosts.items()})
    return {
        "hosts": [
            {
                "host": host,
                "ranks": [fact.rank for fact in group],
                "device": group[0].device,
                **asdict(group[0].network.used),
            }
            for host, group in hosts.items()
        ],
        "ranks": [fact.to_json() for fact in facts],
        "faults": differences(facts) + findings.crowded_faults(hosts) + faults,
        "notes": [*notes, *([ALONE] if len(facts) == 1 else [])],
        "links": [],
        "rates": [],
        "gpus": [],
    }


def measure(
    report: dict[str, Any],
    facts: Sequence[Facts],
    hosts: Mapping[str, Sequence[Facts]],
    environment: RankEnvironment,
    device: torch.device,
    store: dist.Store,
) -> None:
    """Adds what takes a process group to the report. Collective."""
    examined = Examined.of(hosts)
    names = [f"rank {fact.rank} of {fact.host}" for fact in facts]
    with open_world(environment.rank, environment.size, device, store, timeout=TIMEOUT):
        if environment.rank == 0 and len(examined.ranks) > 1:
            said = f"{len(examined.ranks)} {'hosts' if len(hosts) > 1 else 'ranks'}"
            rounds = len(tournament(len(examined.ranks)))
            print(
                f"measuring   all pairs of {said} in {rounds} rounds", file=sys.stderr, flush=True
            )
        links = settled_links(examined, device)
        # a CPU is one of its host, a GPU one of its rank
        leads = environment.rank in {group[0].rank for group in hosts.values()}
        measures = leads or device.type == "cuda"
        rates = settled_rates(lambda: measure_rates(device) if measures else None, facts, names)
        found: list[tuple[list[Gpu], str] | None] = [None] * environment.size
        dist.all_gather_object(found, gpus() if leads else None)
    by_host = dict(zip(hosts, filter(None, found), strict=True))
    report["faults"] += findings.link_faults(links, examined.names, examined.speeds)
    if len(hosts) > 1:
        report["faults"] += findings.clock_faults(links, examined.names)
    report["faults"] += findings.rate_faults(rates, facts, names)
    report["faults"] += [f for host, told in by_host.items() for f in gpu_faults(host, *told)]
    report["links"] = [link_entry(link, examined.names) for link in links.values()]
    report["rates"] = [{"rank": rank, **asdict(found)} for rank, found in rates.items()]
    report["gpus"] = [
        {"host": h, **asdict(gpu)} for h, (told, _) in by_host.items() for gpu in told
    ]


def link_entry(link: Link, names: Sequence[str]) -> dict[str, Any]:
    """A link as the report has it: bytes per second, and seconds."""
    return {
        "first": names[link.first],
        "second": names[link.second],
        "bytes_per_s": link.forward,
        "bytes_per_s_back": link.backward,
        "latency_s": link.latency,
        "skew_s": link.skew.seconds,
        "skew_bound_s": link.skew.bound,
    }


def settled_links(examined: Examined, device: torch.device) -> dict[Pair, Link]:
    """Measures all pairs, and those that look slow again: a pause of the network is no fault."""
    links = measure_links(tournament(len(examined.ranks)), examined.ranks, device)
    for _ in range(AGAIN):
        doubtful = findings.doubtful_pairs(links, examined.speeds)
        if not doubtful:
            break
        again = measure_links(rounds_of(doubtful, len(examined.ranks)), examined.ranks, device)
        links |= {pair: link.merged(again[pair]) for pair, link in links.items() if pair in again}
    return dict(sorted(links.items()))


def settled_rates(
    action: Callable[[], Rates | None], facts: Sequence[Facts], names: list[str]
) -> dict[int, Rates]:
    """Measures all processors at once, and again while one looks slow; returns rates by rank."""
    rates: dict[int, Rates] = {}
    for _ in range(1 + AGAIN):
        meet(torch.device("cpu"))
        gathered: list[Rates | None] = [None] * len(facts)
        dist.all_gather_object(gathered, action())
        found = {rank: r for rank, r in enumerate(gathered) if r is not None}
        rates = {rank: r.merged(rates.get(rank, r)) for rank, r in found.items()}
        if not findings.rate_faults(rates, facts, names):
            break
    return rates
