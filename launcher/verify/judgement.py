"""Judges a layout by its differences from one process: equal, equal up to rounding, not equal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from colonnade.launcher.verify.equal import BOUNDS, Bounds, Difference, compare
from colonnade.launcher.verify.rounding import ULP, Noise
from colonnade.launcher.verify.trace import KINDS, Trace

# What else than another seed may help where a tensor is inconclusive.
REMEDY = {"fp64": "", "fp32": ", or train.device=cpu, which has fp64"}


@dataclass(frozen=True)
class Pass:
    """The comparison of a layout in one precision with one process in fp64.

    Attributes:
        layout: its name, as `parse_layout` reads it.
        precision: `fp64` or `fp32`.
        differences: of every tensor, by kind, the worst first.
        seconds: of processor time, of all ranks together.
    """

    layout: str
    precision: str
    differences: dict[str, list[Difference]]
    seconds: float = 0.0

    @property
    def exceeds(self) -> bool:
        """Whether a tensor exceeds its bound."""
        return any(of_kind and of_kind[0].excess > 1 for of_kind in self.differences.values())


def compare_traces(
    layout: str, precision: str, ours: Trace, exact: Trace, bounds: Bounds | None = None
) -> Pass:
    """Compares a layout's trace with the reference; `bounds` default to those of the precision."""
    limits = bounds or BOUNDS[precision]
    differences = {
        kind: compare(getattr(ours, kind), getattr(exact, kind), limits, ours.replica_differences)
        for kind in KINDS
    }
    return Pass(layout, precision, differences)


def judge(passes: Sequence[Pass], noise: Mapping[str, Noise]) -> list[dict[str, Any]]:
    """Judges every pass; returns the report's entry of each.

    Args:
        passes: the one of a layout in fp64, if there is one, stands before the one in fp32.
        noise: by precision, how far rounding alone moves each tensor; given for each precision in
            which a bound was exceeded.
    """
    results: list[dict[str, Any]] = []
    for one in passes:
        proved = any(r["layout"] == one.layout and r["equal"] for r in results)
        results.append(judge_pass(one, noise.get(one.precision), proved))
    return results


def judge_pass(one: Pass, noise: Noise | None, proved: bool) -> dict[str, Any]:
    """The report's entry of one pass; `proved` says that the layout is equal in fp64."""
    kinds, largest_amplification = {}, 0.0
    for kind, of_kind in one.differences.items():
        differences = [
            d._replace(noise=noise[kind].get(d.name, 0.0)) if noise else d for d in of_kind
        ]
        kinds[kind] = judge_kind(differences, one.precision, proved)
        explained = [d for d in differences if d.judgement in ("rounding", "inconclusive")]
        amplifications = (amplification(d, one.precision) for d in explained)
        largest_amplification = max([largest_amplification, *amplifications])
    equal = not any(entry["unequal"] for entry in kinds.values())
    rounding = any(entry["rounding"] for entry in kinds.values())
    return {
        "layout": one.layout,
        "precision": one.precision,
        "equal": equal,
        "verdict": ("equal up to rounding" if rounding else "equal") if equal else "not equal",
        "amplification": (
            largest_amplification if math.isfinite(largest_amplification) and rounding else None
        ),
        "processor_seconds": one.seconds,
        "bounds": asdict(BOUNDS[one.precision]),
        "compared": kinds,
    }


def judge_kind(differences: Sequence[Difference], precision: str, proved: bool) -> dict[str, Any]:
    """The report's entry of one kind of tensors.

    `proved` says that the layout is equal in fp64: inconclusive tensors then count as rounding.
    """
    explained = ("rounding", "inconclusive") if proved else ("rounding",)
    rounding = [d for d in differences if d.judgement in explained]
    wrong = [d for d in differences if d.judgement not in ("equal", *explained)]
    worst = min(wrong, key=fault_order) if wrong else (rounding or differences)[0]
    verdict = f"{worst}{noise_text(worst, precision)}" if wrong or rounding else "equal"
    if wrong and worst.judgement == "inconclusive":
        verdict += f"; try another train.seed{REMEDY[precision]}"
    return {
        "tensors": len(differences),
        "unequal": len(wrong),
        "rounding": len(rounding),
        "worst": worst.name,
        "difference": worst.difference if math.isfinite(worst.difference) else None,
        "allowed": worst.allowed,
        "noise": worst.noise if worst.noise and math.isfinite(worst.noise) else None,
        "verdict": verdict,
    }


def noise_text(d: Difference, precision: str) -> str:
    """Text that says how far rounding alone moves a tensor; empty where that is not known."""
    if d.why or not d.noise:
        return ""
    times = amplification(d, precision)
    text = f"; rounding alone moves it by {d.noise:.3g} (an ulp, amplified {times:,.0f} times)"
    if d.judgement == "inconclusive":
        text += f", so that {precision} tells nothing of it"
    return text


def amplification(d: Difference, precision: str) -> float:
    """By how many ulps of its largest element a tensor moves when every weight moves by one ulp."""
    return d.noise / (ULP[precision] * d.size) if d.size else math.inf


def fault_order(d: Difference) -> tuple[str, bool]:
    """A sort key of faulty tensors: by step, since a fault at one step spreads at the next.

    Of one step, unequal tensors come before inconclusive ones.
    """
    return d.name.partition(":")[0].removeprefix("after "), d.judgement == "inconclusive"
