"""What a layout's differences from one process say: equal, equal up to rounding, or not equal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from colonnade.launcher.verify.equal import BOUNDS, Bounds, Difference, compare
from colonnade.launcher.verify.rounding import ULP, Noise
from colonnade.launcher.verify.trace import KINDS, Trace

# Where a tensor tells nothing, beside another seed: what else could.
REMEDY = {"fp64": "", "fp32": ", or train.device=cpu, which has fp64"}


@dataclass(frozen=True)
class Pass:
    """A layout in one precision beside one process in fp64: by kind every tensor, worst first."""

    layout: str
    precision: str
    differences: dict[str, list[Difference]]

    @property
    def exceeds(self) -> bool:
        """Whether a tensor is beyond its bound."""
        return any(found and found[0].excess > 1 for found in self.differences.values())


def beside(
    layout: str, precision: str, ours: Trace, exact: Trace, bounds: Bounds | None = None
) -> Pass:
    """A trace and the reference; the bounds are those of the precision unless given."""
    limits = bounds or BOUNDS[precision]
    found = {
        kind: compare(getattr(ours, kind), getattr(exact, kind), limits, ours.apart)
        for kind in KINDS
    }
    return Pass(layout, precision, found)


def judge(passes: Sequence[Pass], noise: Mapping[str, Noise]) -> list[dict[str, Any]]:
    """A part of the report for every pass.

    Args:
        passes: of a layout the one in fp64, where there is one, before that in fp32.
        noise: by precision, what rounding alone does; for each in which a bound was exceeded.
    """
    results: list[dict[str, Any]] = []
    for one in passes:
        proved = any(r["layout"] == one.layout and r["equal"] for r in results)
        results.append(judged(one, noise.get(one.precision), proved))
    return results


def judged(one: Pass, noise: Noise | None, proved: bool) -> dict[str, Any]:
    """The part of one pass; `proved` says that the layout is equal in fp64."""
    parts, amplified = {}, 0.0
    for kind, differences in one.differences.items():
        found = [
            d._replace(noise=noise[kind].get(d.name, 0.0)) if noise else d for d in differences
        ]
        parts[kind] = part(found, one.precision, proved)
        beyond = [d for d in found if d.judgement in ("rounding", "lost")]
        amplified = max([amplified, *(amplification(d, one.precision) for d in beyond)])
    equal = not any(p["unequal"] for p in parts.values())
    rounding = any(p["rounding"] for p in parts.values())
    return {
        "layout": one.layout,
        "precision": one.precision,
        "equal": equal,
        "verdict": ("equal up to rounding" if rounding else "equal") if equal else "not equal",
        "amplification": amplified if math.isfinite(amplified) and rounding else None,
        "bounds": asdict(BOUNDS[one.precision]),
        "compared": parts,
    }


def part(found: Sequence[Difference], precision: str, proved: bool) -> dict[str, Any]:
    """What the report says of one kind of tensors."""
    explained = ("rounding", "lost") if proved else ("rounding",)
    rounding = [d for d in found if d.judgement in explained]
    wrong = [d for d in found if d.judgement not in ("equal", *explained)]
    worst = min(wrong, key=first_fault) if wrong else (rounding or found)[0]
    verdict = f"{worst}{because(worst, precision)}" if wrong or rounding else "equal"
    if wrong and worst.judgement == "lost":
        verdict += f"; try another train.seed{REMEDY[precision]}"
    return {
        "tensors": len(found),
        "unequal": len(wrong),
        "rounding": len(rounding),
        "worst": worst.name,
        "difference": worst.difference if math.isfinite(worst.difference) else None,
        "allowed": worst.allowed,
        "noise": worst.noise if worst.noise and math.isfinite(worst.noise) else None,
        "verdict": verdict,
    }


def because(d: Difference, precision: str) -> str:
    """What rounding has to do with a tensor that is beyond its bound."""
    if d.why or not d.noise:
        return ""
    times = amplification(d, precision)
    words = f"; rounding alone moves it by {d.noise:.3g} (an ulp, amplified {times:,.0f} times)"
    if d.judgement == "lost":
        words += f", so that {precision} tells nothing of it"
    return words


def amplification(d: Difference, precision: str) -> float:
    """How many ulps of its largest element one ulp of every weight moves a tensor by."""
    return d.noise / (ULP[precision] * d.size) if d.size else math.inf


def first_fault(d: Difference) -> tuple[str, bool]:
    """Ranks what is wrong by its step, for a fault at one may make all wrong at the next.

    What tells nothing comes behind what tells that it is wrong.
    """
    return d.name.partition(":")[0].removeprefix("after "), d.judgement == "lost"
