"""Compares random valid recipes on random valid layouts as `verify` does; prints a line for each.

python tests/fuzz.py --count 100           every recipe must be equal, or equal up to rounding
python tests/fuzz.py --count 100 --fault   one collective of each is broken, which must be detected

A recipe is a function of its seed alone; `--seed` is that of the first one. Exits 1 where a layout
is not equal, or a fault is not detected.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from random_recipes import random_recipe, verify_arguments
from ranks import RankError, pool
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify.cases import Case
from colonnade.launcher.verify.judgement import Pass, compare_traces, judge
from colonnade.launcher.verify.layouts import Layout, write_layout
from colonnade.launcher.verify.rounding import Noise, measure_noise
from colonnade.launcher.verify.shrink import in_one_process, on_case, shrink
from colonnade.launcher.verify.trace import Trace, record_trace
from colonnade.parallel.world import World

PRECISIONS = ("fp64", "fp32")
# Operators of collectives that sum, with the index of the argument that they send. Some calls of
# all_reduce take the maximum instead; within a step no in-place operator does.
SUMS = {"allreduce_": 0, "_reduce_scatter_base_": 1, "all_reduce": 0, "reduce_scatter_tensor": 0}


class BrokenCollective(TorchDispatchMode):
    """Halves what this rank sends to one collective sum, that of index `broken`; None breaks none.

    Counts only sums of floating-point tensors of more than one element: single numbers are reports.
    """

    def __init__(self, broken: int | None) -> None:
        super().__init__()
        self.broken, self.sums = broken, 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        position = SUMS.get(func._schema.name.partition("::")[2])
        if position is not None and not (isinstance(args[1], str) and args[1] == "max"):
            sent = args[position]
            (tensor,) = sent if isinstance(sent, list) else (sent,)
            if tensor.is_floating_point() and tensor.numel() > 1:
                self.sums += 1
                if self.sums - 1 == self.broken:
                    half = tensor.mul_(0.5) if "c10d::" in func._schema.name else tensor * 0.5
                    sent = [half] if isinstance(sent, list) else half
                    args = (*args[:position], sent, *args[position + 1 :])
        return func(*args, **(kwargs or {}))


def world_of(rank: int, size: int) -> World:
    """The world of a rank of a pool, on the CPU."""
    return World(rank, size, torch.device("cpu"))


def reference(rank: int, size: int, small: Recipe) -> Trace:
    """Records the reference trace, in one process."""
    return record_trace(in_one_process(small), world_of(rank, size))


def noise_of(rank: int, size: int, small: Recipe, precision: str) -> Noise:
    """Measures how far rounding alone moves the reference."""
    return measure_noise(small, precision, world_of(rank, size))


def trace_layout(
    rank: int, size: int, small: Recipe, layout: Layout, precision: str, exact: Trace,
    fault: int | None,
) -> tuple[Trace, int]:  # fmt: skip
    """Records a layout's trace, and counts its sums; the last rank breaks that of index `fault`."""
    recipe = on_case(small, size, Case(layout), precision)
    with BrokenCollective(fault if rank == size - 1 else None) as mode:
        return record_trace(recipe, world_of(rank, size), exact.parameters), mode.sums


def passes(
    small: Recipe, ranks: int, layout: Layout, exact: Trace, fault: Random | None
) -> Iterator[Pass]:
    """Compares both precisions; with `fault`, one random sum is broken, the same in both."""
    broken = None
    if fault is not None:
        _, sums = pool(ranks).run(trace_layout, small, layout, "fp64", exact, None)[0]
        broken = fault.randrange(sums) if sums else None
    for precision in PRECISIONS:
        trace, _ = pool(ranks).run(trace_layout, small, layout, precision, exact, broken)[0]
        yield compare_traces(write_layout(layout), precision, trace, exact)


def verdict(seed: int, ranks: int, symbols: str, fault: bool) -> tuple[str, str]:
    """Returns verify's verdict on a seed's recipe and layout, and a line that describes it."""
    recipe, layout = random_recipe(seed, ranks, symbols)
    small = shrink(recipe, ranks, [Case(layout)])
    (exact,) = pool(1).run(reference, small)
    name = f"{seed:5} {recipe.model.symbols:<15} {write_layout(layout):<50}"
    if not all(bool(loss.isfinite()) for loss in exact.losses.values()):
        return "not finite", f"{name} the reference is not finite"
    both = list(passes(small, ranks, layout, exact, Random(seed) if fault else None))
    noise = {p.precision: pool(1).run(noise_of, small, p.precision)[0] for p in both if p.exceeds}
    results = judge(both, noise)
    text = "; ".join(f"{r['precision']} {r['verdict']}{detail(r)}" for r in results)
    rank_of = ("equal", "equal up to rounding", "not equal").index
    worst = max((r["verdict"] for r in results), key=rank_of)
    if worst == "not equal":
        text += f"\n      {verify_arguments(recipe, layout)}"
    return worst, f"{name} {text}{noise_multiple(both, noise)}"


def detail(result: dict[str, Any]) -> str:
    """Describes the worst tensor of a result that is not equal within its bounds."""
    kinds = result["compared"].values()
    worst = next((p for p in kinds if p["unequal"]), None)
    worst = worst or next((p for p in kinds if p["rounding"]), None)
    return f" ({worst['verdict']})" if worst else ""


def noise_multiple(both: list[Pass], noise: dict[str, Noise]) -> str:
    """Formats the largest difference beyond a bound as a multiple of its noise."""
    multiples = [
        d.difference / (noise[p.precision][kind].get(d.name) or 1e-300)
        for p in both
        for kind, differences in p.differences.items()
        for d in differences
        if d.excess > 1
    ]
    return f" [{max(multiples):.2g} times the noise]" if multiples else ""


def main() -> int:
    """Runs every seed, and prints the number of seeds with each verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--symbols", default="", help="every pattern has at least one of these")
    parser.add_argument("--fault", action="store_true", help="break a collective of each")
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    start = time.monotonic()
    for seed in range(a.seed, a.seed + a.count):
        ranks = 4 if seed % 4 == 3 else 2
        try:
            outcome, line = verdict(seed, ranks, a.symbols, a.fault)
        except RankError as error:  # a broken sum may cause it; without one it is a bug
            outcome, line = "failed", f"{seed:5} failed: {str(error).strip().splitlines()[-1]}"
        counts[outcome] += 1
        print(line, flush=True)
    for size in (1, 2, 4):
        pool(size).close()
    print(f"{dict(counts)} in {time.monotonic() - start:.0f} s")
    wrong = ("equal", "equal up to rounding") if a.fault else ("not equal", "failed")
    return 1 if any(counts[outcome] for outcome in wrong) else 0


if __name__ == "__main__":
    import fuzz  # ranks import functions by name, which `__main__` would not give them

    sys.exit(fuzz.main())
