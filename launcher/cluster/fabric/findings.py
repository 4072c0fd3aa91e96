"""What is wrong with measured links, clocks and processors, in sentences."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from colonnade.launcher.cluster.fabric.clock import Skew
from colonnade.launcher.cluster.fabric.health import Rates
from colonnade.launcher.cluster.fabric.links import Link
from colonnade.launcher.cluster.fabric.tournament import Pair
from colonnade.launcher.cluster.facts import SHOWN, Facts, enumerated

FACTOR = 2.0  # by which a bandwidth is below others where that is said
# A pair should reach a tenth of its slower link, of a link of 10 Gbit/s at most: one connection
# through the kernel's TCP does not fill faster ones.
EXPECTED_SHARE = 0.1
EXPECTED_SPEED = 10_000  # Mbit/s
# The lowest rate that is not called slow, as a share of the median of the others. GPUs of one model
# are alike, the processors of hosts may serve other programs.
SHARE = {"cuda": 0.85, "cpu": 0.5}
# Seconds. A run's events and saves have times in seconds, which `report` and people put in order
# when a job went on on other hosts; a lock's sign of life comes every 5 s.
CLOCKS = 1.0


def rate(bytes_per_second: float) -> str:
    """Writes a bandwidth for people: `117 MB/s`, `1.2 GB/s`, in powers of ten as for links."""
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.1f} GB/s"
    return f"{bytes_per_second / 1e6:.3g} MB/s"


def seconds(amount: float) -> str:
    """Writes seconds for people: `12 µs`, `0.35 ms`, `2.1 s`."""
    if abs(amount) >= 1:
        return f"{amount:.1f} s"
    return f"{amount * 1e3:.2g} ms" if abs(amount) >= 1e-4 else f"{amount * 1e6:.0f} µs"


def figures(links: Mapping[Pair, Link], of: Callable[[Link], float]) -> dict[int, float]:
    """The higher median, over a member's links, of a figure of each; by member.

    The higher one: of three members one is slow, and both others have one slow link of two.
    """
    values: dict[int, list[float]] = {}
    for link in links.values():
        for member in (link.first, link.second):
            values.setdefault(member, []).append(of(link))
    return {member: statistics.median_high(v) for member, v in sorted(values.items())}


def expected(pair: Pair, speeds: Sequence[int | None]) -> float:
    """The bytes per second that a pair should reach, by the speeds of its links in Mbit/s."""
    known = [speed for member in pair if (speed := speeds[member])]
    return min([*known, EXPECTED_SPEED]) * EXPECTED_SHARE * 1e6 / 8 if known else 0.0


def slow_members(links: Mapping[Pair, Link]) -> dict[int, tuple[float, float]]:
    """The members that are slower than the others: their figure, and the median of the others'."""
    usual = figures(links, lambda link: link.slower)
    slow = {}
    for member, figure in usual.items():
        others = [other for m, other in usual.items() if m != member]
        if len(others) > 1 and figure * FACTOR < (median := statistics.median(others)):
            slow[member] = figure, median
    return slow


def slow_pairs(
    links: Mapping[Pair, Link], names: Sequence[str], speeds: Sequence[int | None]
) -> dict[Pair, tuple[str, str]]:
    """The pairs that are slow, though none of their members is: what is wrong, and with whom."""
    members = slow_members(links)
    rest = {pair: link for pair, link in links.items() if not set(pair) & set(members)}
    usual = statistics.median(link.slower for link in rest.values()) if rest else 0.0
    slow = {}
    for pair, link in rest.items():
        a, b = (names[member] for member in pair)
        low, high = sorted((link.forward, link.backward))
        if low * FACTOR < high:
            source, target = (a, b) if link.forward < link.backward else (b, a)
            slow[pair] = (
                "links are slow in one direction",
                f"{rate(low)} from {source} to {target}, {rate(high)} back",
            )
        elif low * FACTOR < usual:
            what = f"links are slower than the usual {rate(usual)}"
            slow[pair] = what, f"{rate(low)} between {a} and {b}"
        elif low < expected(pair, speeds):
            speed = min(known for member in pair if (known := speeds[member]))
            slow[pair] = (
                "links are far slower than their speed",
                f"{rate(low)} of {speed / 1000:g} Gbit/s between {a} and {b}",
            )
    return slow


def doubtful_pairs(links: Mapping[Pair, Link], speeds: Sequence[int | None]) -> set[Pair]:
    """The pairs that `link_faults` would speak of, and so are measured again: other load may have
    been the cause."""
    members = slow_members(links)
    names = [""] * len(speeds)
    return {pair for pair in links if set(pair) & set(members)} | {
        *slow_pairs(links, names, speeds)
    }


def link_faults(
    links: Mapping[Pair, Link], names: Sequence[str], speeds: Sequence[int | None]
) -> list[str]:
    """Names members that are slower than the others, and pairs that are slow without such a one.

    Args:
        links: by pair.
        names: of the members, hosts or ranks.
        speeds: of the links of their interfaces in Mbit/s; None where it is unknown.
    """
    faults = [
        f"{names[member]} is slow: {rate(figure)} with the others (median), which reach "
        f"{rate(median)}, {median / figure:.1f} times as much"
        for member, (figure, median) in slow_members(links).items()
    ]
    said: dict[str, list[str]] = {}
    for what, whom in slow_pairs(links, names, speeds).values():
        said.setdefault(what, []).append(whom)
    return faults + [
        f"{what}: {'; '.join(pairs[:SHOWN])}"
        + (f"; and {len(pairs) - SHOWN} other pairs" if len(pairs) > SHOWN else "")
        for what, pairs in said.items()
    ]


def skew_between(links: Mapping[Pair, Link], first: int, second: int) -> Skew:
    """How far the second member's clock is ahead of the first one's."""
    if first == second:
        return Skew(0.0, 0.0)
    if first < second:
        return links[first, second].skew
    return links[second, first].skew.reversed()


def reference_clock(links: Mapping[Pair, Link], members: int) -> int:
    """The member whose clock is the (lower) median of all."""
    return sorted(range(members), key=lambda m: skew_between(links, 0, m).seconds)[
        (members - 1) // 2
    ]


def clock_faults(links: Mapping[Pair, Link], names: Sequence[str]) -> list[str]:
    """Names hosts whose clocks are off by more than `CLOCKS` for certain."""
    reference = reference_clock(links, len(names)) if links else 0
    faults = []
    for member, name in enumerate(names):
        if not links or member == reference:
            continue
        found = skew_between(links, reference, member)
        if found.at_least > CLOCKS:
            side = "ahead of" if found.seconds > 0 else "behind"
            faults.append(
                f"the clock of {name} is {seconds(abs(found.seconds))} (± {seconds(found.bound)}) "
                f"{side} that of {names[reference]}: times of events cannot be compared; start NTP "
                "or chrony"
            )
    return faults


def rate_faults(rates: Mapping[int, Rates], facts: Sequence[Facts], names: list[str]) -> list[str]:
    """Names processors that are slower than the others of the same name.

    Args:
        rates: by rank.
        facts: by rank.
        names: of what a rank stands for, by rank.
    """
    faults = []
    for rank, own in rates.items():
        alike = [r for r in rates if r != rank and facts[r].device == facts[rank].device]
        device_type = facts[rank].device_type
        for what, of, write in RATES[device_type]:
            others = [of(rates[r]) for r in alike]
            figure, median = of(own), statistics.median(others or [0.0])
            if figure < SHARE[device_type] * median:
                faults.append(
                    f"{names[rank]} is slow in {what}: {write(figure)}, while the others reach "
                    f"{write(median)} (median)"
                )
    return faults


def flops(per_second: float) -> str:
    """Writes FLOP/s for people."""
    if per_second >= 1e12:
        return f"{per_second / 1e12:.0f} TFLOP/s"
    return f"{per_second / 1e9:.0f} GFLOP/s"


# What is compared between processors. A CPU's memory is shared with other programs.
RATES: dict[str, list[tuple[str, Callable[[Rates], float], Callable[[float], str]]]] = {
    "cpu": [("matrix products", lambda rates: rates.product, flops)],
    "cuda": [
        ("matrix products", lambda rates: rates.product, flops),
        ("copies in memory", lambda rates: rates.copy, rate),
        ("copies from the host", lambda rates: rates.from_host or 0.0, rate),
    ],
}


def crowded_faults(hosts: Mapping[str, Sequence[Facts]]) -> list[str]:
    """Says which hosts have another number of ranks than most."""
    counts = {host: len(group) for host, group in hosts.items()}
    usual = statistics.mode(counts.values())
    odd = [host for host, number in counts.items() if number != usual]
    if not odd:
        return []
    numbers = enumerated([f"{host} ({counts[host]})" for host in odd])
    return [f"hosts differ in their number of ranks: most have {usual}, but {numbers}"]
