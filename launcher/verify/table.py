"""Formats the report of `verify` for people: a table for each layout, and a verdict.

Of a covering set, whose layouts are many, the equal ones have a line each.
"""

from collections.abc import Iterator
from typing import Any

from colonnade.launcher.verify.equal import Bounds
from colonnade.launcher.verify.trace import KINDS


def table(report: dict[str, Any]) -> str:
    """The report of a recipe as text."""
    lines = [
        f"{report['recipe']} at test size, {report['steps']} steps on {report['ranks']} ranks "
        f"({report['device']}), beside one process in fp64"
    ]
    covering = report.get("covering")
    for result in report["layouts"]:
        brief = covering is not None and result["equal"]
        lines += list(short_line(result)) if brief else ["", *layout_lines(result)]
    if covering is not None:
        lines += ["", covering_line(report)]
    return "\n".join([*lines, "", *verdict(report["layouts"])])


def table_of_all(report: dict[str, Any]) -> str:
    """The report of the recipes of all families as text."""
    texts = [table(of_recipe) for of_recipe in report["recipes"]]
    results = [result for of_recipe in report["recipes"] for result in of_recipe["layouts"]]
    unequal = sum(not result["equal"] for result in results)
    last = f"{len(results)} cases of {len(texts)} recipes"
    last = f"NOT EQUAL: {unequal} of {last}" if unequal else f"equal: {last}"
    seconds = f"{report['processor_seconds']:,.0f} s of processor time"
    return "\n\n".join([*texts, f"{last}, {seconds}"])


def short_line(result: dict[str, Any]) -> Iterator[str]:
    """The line of a layout that is equal."""
    yield f"{result['layout']}  {result['precision']}  {result['verdict']}"


def covering_line(report: dict[str, Any]) -> str:
    """The line that says what a covering set covers."""
    covering = report["covering"]
    count = len({result["layout"] for result in report["layouts"]})
    total = covering["cases"]
    pairs, impossible = covering["pairs"], len(covering["impossible"])
    text = f"{count} of the {total} cases that have" if count < total else f"{total} cases have"
    return f"{text} all {pairs} possible pairs of choices ({impossible} are impossible)"


def verdict(results: list[dict[str, Any]]) -> Iterator[str]:
    """The last line: which layouts are not equal, or that all are equal."""
    unequal = [r for r in results if not r["equal"]]
    rounding = [r for r in results if r["verdict"] == "equal up to rounding"]
    count = len({r["layout"] for r in results})
    if unequal:
        yield f"NOT EQUAL: {names(unequal)}"
        return
    up_to = f", up to rounding: {names(rounding)}" if rounding else ""
    yield f"equal: {count} layout{'s' * (count > 1)}{up_to}"


def names(results: list[dict[str, Any]]) -> str:
    """The layouts of results, with their precisions."""
    return ", ".join(f"{r['layout']} in {r['precision']}" for r in results)


def layout_lines(result: dict[str, Any]) -> Iterator[str]:
    """The lines of one layout in one precision: its bounds, a row for each kind, its verdict."""
    compared = result["compared"]
    width = max(len(entry["worst"]) for entry in compared.values())
    yield f"{result['layout']}  {result['precision']}  {Bounds(**result['bounds'])}"
    yield f"  {'':<14} {'tensors':>7}  {'worst':<{width}}  {'difference':>10}  {'allowed':>8}"
    for kind, entry in compared.items():
        difference = "-" if entry["difference"] is None else f"{entry['difference']:.1e}"
        yield (
            f"  {KINDS[kind]:<14} {entry['tensors']:>7}  {entry['worst']:<{width}}  "
            f"{difference:>10}  {entry['allowed']:>8.1e}"
        )
    counted = "rounding" if result["equal"] else "unequal"
    exceeding = [
        f"{entry[counted]} of {entry['tensors']} {KINDS[kind]}, worst: {entry['verdict']}"
        for kind, entry in compared.items()
        if entry[counted]
    ]
    text = result["verdict"] if result["equal"] else result["verdict"].upper()
    yield f"  {text}: {'; '.join(exceeding)}" if exceeding else f"  {text}"
