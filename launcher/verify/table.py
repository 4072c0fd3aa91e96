"""The report of `verify` for people: a table per layout, and its verdict."""

from collections.abc import Iterator
from typing import Any

from colonnade.launcher.verify.equal import Bounds
from colonnade.launcher.verify.trace import KINDS


def table(report: dict[str, Any]) -> str:
    """The whole report as text."""
    lines = [
        f"{report['recipe']} at test size, {report['steps']} steps on {report['ranks']} ranks "
        f"({report['device']}), beside one process in fp64"
    ]
    for result in report["layouts"]:
        lines += ["", *rows(result)]
    for skipped in report["skipped"]:
        lines += ["", f"{skipped['layout']}  skipped: {skipped['why']}"]
    return "\n".join([*lines, "", *verdict(report["layouts"])])


def verdict(results: list[dict[str, Any]]) -> Iterator[str]:
    """The last line: what is not equal, or that all layouts are."""
    unequal = [r for r in results if not r["equal"]]
    rounding = [r for r in results if r["verdict"] == "equal up to rounding"]
    count = len({r["layout"] for r in results})
    if unequal:
        yield f"NOT EQUAL: {names(unequal)}"
        return
    up_to = f", up to rounding: {names(rounding)}" if rounding else ""
    yield f"equal: {count} layout{'s' * (count > 1)}{up_to}"


def names(results: list[dict[str, Any]]) -> str:
    """Layouts with their precisions."""
    return ", ".join(f"{r['layout']} in {r['precision']}" for r in results)


def rows(result: dict[str, Any]) -> Iterator[str]:
    """One layout in one precision."""
    compared = result["compared"]
    width = max(len(part["worst"]) for part in compared.values())
    yield f"{result['layout']}  {result['precision']}  {Bounds(**result['bounds'])}"
    yield f"  {'':<14} {'tensors':>7}  {'worst':<{width}}  {'difference':>10}  {'allowed':>8}"
    for kind, part in compared.items():
        difference = "-" if part["difference"] is None else f"{part['difference']:.1e}"
        yield (
            f"  {KINDS[kind]:<14} {part['tensors']:>7}  {part['worst']:<{width}}  "
            f"{difference:>10}  {part['allowed']:>8.1e}"
        )
    count = "rounding" if result["equal"] else "unequal"
    beyond = [
        f"{part[count]} of {part['tensors']} {KINDS[kind]}, worst: {part['verdict']}"
        for kind, part in compared.items()
        if part[count]
    ]
    words = result["verdict"] if result["equal"] else result["verdict"].upper()
    yield f"  {words}: {'; '.join(beyond)}" if beyond else f"  {words}"
