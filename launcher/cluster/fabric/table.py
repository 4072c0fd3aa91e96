"""The report of `doctor --cluster` as text."""

import statistics
from collections.abc import Sequence
from typing import Any

from colonnade.launcher.cluster.columns import aligned
from colonnade.launcher.cluster.fabric.findings import flops, rate, seconds

MATRIX = 8  # members of which all pairs are shown
SLOWEST = 8  # pairs that are shown where there are more members

Report = dict[str, Any]


def table(report: Report) -> str:
    """Writes hosts, pairs, GPUs and what is wrong, one below the other."""
    parts = [host_table(report), pair_table(report), gpu_table(report), verdict(report)]
    return "\n\n".join(part for part in parts if part)


def host_table(report: Report) -> str:
    """A line for each host."""
    rates = {entry["rank"]: entry for entry in report["rates"]}
    rows = [["host", "ranks", "interface", "address", "speed", "products", "clock", "device"]]
    for entry in report["hosts"]:
        ranks, speed = entry["ranks"], entry["speed"]
        measured = [rates[rank]["product"] for rank in ranks if rank in rates]
        rows.append(
            [
                entry["host"],
                numbers(ranks),
                entry["interface"],
                entry["address"],
                f"{speed / 1000:g} Gbit/s" if speed else "unknown",
                flops(statistics.median(measured)) if measured else "-",
                clock(report, entry["host"]),
                entry["device"],
            ]
        )
    return aligned(rows)


def numbers(ranks: Sequence[int]) -> str:
    """Writes ranks as `0-7`, or one by one where they do not follow each other."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def clock(report: Report, host: str) -> str:
    """How far a host's clock is ahead of the first host's."""
    for link in report["links"]:
        if (link["first"], link["second"]) == (report["hosts"][0]["host"], host):
            sign = "+" if link["skew_s"] >= 0 else "-"
            return f"{sign}{seconds(abs(link['skew_s']))} ± {seconds(link['skew_bound_s'])}"
    return "-"


def pair_table(report: Report) -> str:
    """The bandwidth of all pairs as a matrix, or the slowest pairs; and the median latency."""
    links = report["links"]
    if not links:
        return ""
    names = list(dict.fromkeys(name for link in links for name in (link["first"], link["second"])))
    latency = seconds(statistics.median(link["latency_s"] for link in links))
    usual = rate(statistics.median(v for link in links for v in ways(link)))
    head = (
        f"{len(links)} {'pair' if len(links) == 1 else 'pairs'}: median {usual}, latency {latency}"
    )
    if len(names) > MATRIX:
        slowest = sorted(links, key=lambda link: min(ways(link)))[:SLOWEST]
        rows = [["slowest pairs", "", "there", "back", "latency"]]
        rows += [
            [k["first"], k["second"], *map(rate, ways(k)), seconds(k["latency_s"])] for k in slowest
        ]
        return f"{head}\n{aligned(rows)}"
    cells = {}
    for link in links:
        cells[link["first"], link["second"]], cells[link["second"], link["first"]] = ways(link)
    rows = [["from, to", *names]]
    rows += [[a, *(rate(cells[a, b]) if a != b else "" for b in names)] for a in names]
    return f"{head}\n{aligned(rows)}"


def ways(link: Report) -> tuple[float, float]:
    """The bandwidth of both directions in bytes per second."""
    return link["bytes_per_s"], link["bytes_per_s_back"]


def gpu_table(report: Report) -> str:
    """A line for each GPU that nvidia-smi told of."""
    if not report["gpus"]:
        return ""
    rows = [["host", "GPU", "°C", "memory errors", "PCIe lanes", "clocks lowered", "model"]]
    for gpu in report["gpus"]:
        lanes = f"{gpu['pcie_width']} of {gpu['pcie_width_max']}"
        state = [gpu["temperature"], gpu["ecc_errors"]]
        known = ["-" if value is None else str(value) for value in state]
        lowered = ", ".join(gpu["throttled"]) or "no"
        rows.append([gpu["host"], str(gpu["index"]), *known, lanes, lowered, gpu["name"]])
    return aligned(rows)


def verdict(report: Report) -> str:
    """What is wrong, a line each; notes; and the time that it took."""
    faults, notes = report["faults"], report["notes"]
    lines = [f"wrong: {fault}" for fault in faults] + [f"note: {note}" for note in notes]
    lines += [] if faults else [f"nothing is wrong ({report['seconds']} s)"]
    return "\n".join(lines)
