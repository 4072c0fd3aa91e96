"""Random valid recipes on random valid layouts through `verify`'s comparison; a line for each.

python tests/fuzz.py --count 100              every one has to be equal, or equal up to rounding
python tests/fuzz.py --count 100 --fault      one collective of each is broken, and has to be found

A recipe follows from its seed alone; `--seed` is that of the first one. Exits 1 where a layout is
not equal, or a fault is not found.
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
from random_recipes import described, random_recipe
from ranks import RankError, pool
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify.judgement import Pass, compare_traces, judge
from colonnade.launcher.verify.layouts import Layout, write_layout
from colonnade.launcher.verify.rounding import Noise, measure_noise
from colonnade.launcher.verify.shrink import in_one_process, on_layout, shrink
from colonnade.launcher.verify.trace import Trace, record_trace
from colonnade.parallel.world import World

PRECISIONS = ("fp64", "fp32")
# Collectives that add, as operators, with the place of what they send. Of all_reduce some take the
# largest; of the operators that work in place none does within a step.
SUMS = {"allreduce_": 0, "_reduce_scatter_base_": 1, "all_reduce": 0, "reduce_scatter_tensor": 0}


class Broken(TorchDispatchMode):
    """Halves what this rank sends to one sum between ranks, the one of this `number`.

    Only sums of several floating numbers count: not those of figures for people.
    """

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.number, self.sums = number, 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        place = SUMS.get(func._schema.name.partition("::")[2])
        if place is not None and not (isinstance(args[1], str) and args[1] == "max"):
            sent = args[place]
            (tensor,) = sent if isinstance(sent, list) else (sent,)
            if tensor.is_floating_point() and tensor.numel() > 1:
                self.sums += 1
                if self.sums - 1 == self.number:
                    half = tensor.mul_(0.5) if "c10d::" in func._schema.name else tensor * 0.5
                    sent = [half] if isinstance(sent, list) else half
                    args = (*args[:place], sent, *args[place + 1 :])
        return func(*args, **(kwargs or {}))


def world_of(rank: int, size: int) -> World:
    """A rank of a pool."""
    return World(rank, size, torch.device("cpu"))


def reference(rank: int, size: int, small: Recipe) -> Trace:
    """One process."""
    return record_trace(in_one_process(small), world_of(rank, size))


def rounded(rank: int, size: int, small: Recipe, precision: str) -> Noise:
    """What rounding does to it."""
    return measure_noise(small, precision, world_of(rank, size))


def laid(
    rank: int, size: int, small: Recipe, layout: Layout, precision: str, exact: Trace,
    fault: int | None,
) -> tuple[Trace, int]:  # fmt: skip
    """A layout, of which the last rank breaks the sum of this number; and how many there are."""
    recipe = on_layout(small, size, layout, precision)
    with Broken(fault if rank == size - 1 else None) as broken:
        return record_trace(recipe, world_of(rank, size), exact.parameters), broken.sums


def passes(
    small: Recipe, ranks: int, layout: Layout, exact: Trace, fault: Random | None
) -> Iterator[Pass]:
    """Both precisions; where there is a `fault`, with a random sum broken, the same in both."""
    number = None
    if fault is not None:
        whole = pool(ranks).run(laid, small, layout, "fp64", exact, None)[0]
        number = fault.randrange(whole[1]) if whole[1] else None
    for precision in PRECISIONS:
        trace, _ = pool(ranks).run(laid, small, layout, precision, exact, number)[0]
        yield compare_traces(write_layout(layout), precision, trace, exact)


def verdict(seed: int, ranks: int, symbols: str, fault: bool) -> tuple[str, str]:
    """What verify says of a seed's recipe and layout, and a line about it."""
    recipe, layout = random_recipe(seed, ranks, symbols)
    small = shrink(recipe, ranks, [layout])
    (exact,) = pool(1).run(reference, small)
    name = f"{seed:5} {recipe.model.symbols:<15} {write_layout(layout):<50}"
    if not all(bool(loss.isfinite()) for loss in exact.losses.values()):
        return "not finite", f"{name} the reference is not finite"
    both = list(passes(small, ranks, layout, exact, Random(seed) if fault else None))
    moved = {p.precision: pool(1).run(rounded, small, p.precision)[0] for p in both if p.exceeds}
    results = judge(both, moved)
    words = "; ".join(f"{r['precision']} {r['verdict']}{detail(r)}" for r in results)
    rank_of = ("equal", "equal up to rounding", "not equal").index
    worst = max((r["verdict"] for r in results), key=rank_of)
    if worst == "not equal":
        words += f"\n      {described(recipe, layout)}"
    return worst, f"{name} {words}{share(both, moved)}"


def detail(result: dict[str, Any]) -> str:
    """The worst tensor of a result that is not plainly equal."""
    kinds = result["compared"].values()
    worst = next((p for p in kinds if p["unequal"]), None)
    worst = worst or next((p for p in kinds if p["rounding"]), None)
    return f" ({worst['verdict']})" if worst else ""


def share(both: list[Pass], moved: dict[str, Noise]) -> str:
    """The largest difference beyond a bound as a multiple of its noise."""
    found = [
        d.difference / (moved[p.precision][kind].get(d.name) or 1e-300)
        for p in both
        for kind, differences in p.differences.items()
        for d in differences
        if d.excess > 1
    ]
    return f" [{max(found):.2g} times the noise]" if found else ""


def main() -> int:
    """Every seed; the counts at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--symbols", default="", help="one of these stands in every pattern")
    parser.add_argument("--fault", action="store_true", help="break a collective of each")
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    start = time.monotonic()
    for seed in range(a.seed, a.seed + a.count):
        ranks = 4 if seed % 4 == 3 else 2
        try:
            found, line = verdict(seed, ranks, a.symbols, a.fault)
        except RankError as error:  # which a broken sum may lead to; without one it is a fault
            found, line = "failed", f"{seed:5} failed: {str(error).strip().splitlines()[-1]}"
        counts[found] += 1
        print(line, flush=True)
    for size in (1, 2, 4):
        pool(size).close()
    print(f"{dict(counts)} in {time.monotonic() - start:.0f} s")
    wrong = ("equal", "equal up to rounding") if a.fault else ("not equal", "failed")
    return 1 if any(counts[found] for found in wrong) else 0


if __name__ == "__main__":
    import fuzz  # what ranks import by name

    sys.exit(fuzz.main())
