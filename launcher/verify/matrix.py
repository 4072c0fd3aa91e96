"""The parity matrix: what a run of `verify --all` proved, as tables in Markdown."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from colonnade.launcher.verify.cases import Case
from colonnade.launcher.verify.cover import AXES, NEEDS, OPTIONS, Choices, choices_of

WIRINGS = ("standard", "ladder")


class Proof(NamedTuple):
    """The result of one case of a family.

    Attributes:
        family: the kind of model.
        choices: of the case.
        equal: whether it trained what one process did, in every precision.
    """

    family: str
    choices: Choices
    equal: bool


def matrix(report: dict[str, Any]) -> str:
    """The report of `verify_all`, or its `summary`, as two tables in Markdown."""
    found = list(proofs(report))
    families = [one["family"] for one in report["recipes"]]
    ranks, count = report["ranks"], len(found)
    equal = sum(proof.equal for proof in found)
    covering = [one["covering"] for one in report["recipes"]]
    total = sum(c["cases"] for c in covering)
    together = "together they have" if count == total else f"they are a sample of {total} that have"
    precisions = {result["precision"] for one in report["recipes"] for result in one["layouts"]}
    run_in = "" if precisions == {"fp64"} else f", run in {' and '.join(sorted(precisions))},"
    lines = [
        f"{equal} of {count} cases on {ranks} ranks{run_in} are equal to one process in fp64; "
        f"{together} every possible pair of axes and options. Cases with both axes on, with the "
        "standard residual + with ladder:",
        "",
        *pair_table(found, families),
        "",
        "Cases with an option beside an axis that is on, of all families:",
        "",
        *option_table(found),
    ]
    return "\n".join(lines) + "\n"


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What `matrix` reads of a report: every case with its verdict, the sizes of covering sets."""
    return {
        "ranks": report["ranks"],
        "recipes": [
            {
                "family": one["family"],
                "recipe": one["recipe"],
                "covering": {"cases": one["covering"]["cases"], "pairs": one["covering"]["pairs"]},
                "layouts": [
                    {name: result[name] for name in ("layout", "precision", "equal")}
                    for result in one["layouts"]
                ],
            }
            for one in report["recipes"]
        ],
    }


def proofs(report: dict[str, Any]) -> Iterator[Proof]:
    """Yields the result of every case of a report."""
    for one in report["recipes"]:
        equal: dict[str, bool] = {}
        for result in one["layouts"]:
            equal[result["layout"]] = equal.get(result["layout"], True) and result["equal"]
        for name, value in equal.items():
            yield Proof(one["family"], choices_of(Case.parse(name), report["ranks"]), value)


def pair_table(found: Sequence[Proof], families: Sequence[str]) -> Iterator[str]:
    """Yields the lines of the table of pairs of axes by families."""
    yield f"| axes | {' | '.join(families)} |"
    yield "|---|" + "---|" * len(families)
    for a, b in itertools.combinations(AXES, 2):
        cells = []
        for family in families:
            both = [p for p in found if p.family == family and is_on(p, a) and is_on(p, b)]
            wirings = ([p for p in both if p.choices["residual"] == w] for w in WIRINGS)
            cells.append(" + ".join(map(cell, wirings)) if both else "–")
        yield f"| `{a}`, `{b}` | {' | '.join(cells)} |"


def option_table(found: Sequence[Proof]) -> Iterator[str]:
    """Yields the lines of the table of options by axes."""
    yield f"| option | {' | '.join(f'`{axis}`' for axis in AXES)} |"
    yield "|---|" + "---|" * len(AXES)
    for name, values in OPTIONS.items():
        for value in values:
            having = [p for p in found if p.choices.get(name) == value]
            cells = (cell([p for p in having if is_on(p, axis)]) for axis in AXES)
            yield f"| `{option_name(name, value)}` | {' | '.join(cells)} |"


def option_name(name: str, value: object) -> str:
    """An option with its value, as in a recipe."""
    table = "parallel." if name in NEEDS else ""
    return f"{table}{name} = {str(value).lower() if isinstance(value, bool) else value}"


def is_on(proof: Proof, axis: str) -> bool:
    """Whether an axis is on."""
    return proof.choices[axis] == "on"


def cell(found: Iterable[Proof]) -> str:
    """The number of cases, and of those that are not equal."""
    results = [proof.equal for proof in found]
    unequal = results.count(False)
    return f"**{unequal} of {len(results)} not equal**" if unequal else str(len(results) or "–")
