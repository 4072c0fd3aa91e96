"""The report of `verify` for people: a table per layout, and its verdict."""

from collections.abc import Iterator
from typing import Any

from colonnade.launcher.verification.equal import Bounds

KINDS = {"losses": "losses", "norms": "gradient norms", "gradients": "gradients",
         "parameters": "parameters"}  # fmt: skip


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
    unequal = [r for r in report["layouts"] if not r["equal"]]
    names = ", ".join(f"{r['layout']} in {r['precision']}" for r in unequal)
    count = len({r["layout"] for r in report["layouts"]})
    verdict = f"NOT EQUAL: {names}" if unequal else f"equal: {count} layout{'s' * (count > 1)}"
    return "\n".join([*lines, "", verdict])


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
    wrong = [
        f"{part['unequal']} of {part['tensors']} {KINDS[kind]}, worst: {part['verdict']}"
        for kind, part in compared.items()
        if part["unequal"]
    ]
    yield f"  NOT EQUAL: {'; '.join(wrong)}" if wrong else "  equal"
