"""Formats the report of `plan` for people."""

from collections.abc import Iterator
from typing import Any

STATE = {
    "parameters": "shards of parameters and buffers",
    "gradients": "shards of their gradients",
    "optimizer": "optimizer state",
}
PASSES = {
    "activations": "activations, at the peak of a micro-batch's forward and backward pass",
    "gathered": "weights that FSDP has gathered then, and its buffers",
}


def table(report: dict[str, Any]) -> str:
    """Returns the report as text."""
    parts = [heading(report), memory(report), communication(report)]
    parts += [pipeline(report)] if len(report["stages"]) > 1 else []
    return "\n\n".join("\n".join(part) for part in [*parts, times(report)])


def heading(report: dict[str, Any]) -> Iterator[str]:
    """Yields lines that say what was run."""
    layout = ", ".join(f"{axis} {degree}" for axis, degree in report["layout"].items())
    ranks = "1 rank" if report["ranks"] == 1 else f"{report['ranks']:,} ranks"
    yield f"{report['recipe']}: {report['parameters']:,} parameters on {ranks}"
    if layout:
        yield f"layout: {layout}"
    if report["schedule"]:
        yield f"schedule: {report['schedule']}; of a pipeline's ranks the one that holds the most:"
    shape, count = report["micro_batch"], report["micro_batches"]
    yield (
        f"a step of rank {report['rank']:,}: {count} micro-batch{'es' * (count > 1)} of "
        f"{shape['rows']} x {shape['tokens']:,} tokens in {report['precision']}"
    )


def memory(report: dict[str, Any]) -> Iterator[str]:
    """Yields lines of the bytes that the rank holds."""
    held = report["memory"]
    yield f"{'held by the rank':<32}{'bytes':>20}"
    for key, text in {**STATE, **PASSES}.items():
        yield f"  {key:<30}{held[key]:>20,}  {size(held[key]):>10}  {text}"
    in_flight = report["in_flight"]
    flight = f"{in_flight} forward pass{'es' * (in_flight > 1)} in flight"
    yield f"  {'peak':<30}{held['peak']:>20,}  {size(held['peak']):>10}  with {flight}"
    if device := report.get("device"):
        free = device["usable"] - held["peak"]
        others = f"beside {size(device['memory'] - device['usable'])} for driver and communication"
        yield f"  {'left of ' + device['name']:<30}{free:>20,}  {size(free):>10}  {others}"
    if stashed := held["stashed"]:
        what = f"of the host: inputs of sub-blocks and norms, with {flight}"
        yield f"  {'stashed':<30}{stashed:>20,}  {size(stashed):>10}  {what}"


def communication(report: dict[str, Any]) -> Iterator[str]:
    """Yields a line for every axis and collective: the bytes that the rank sends."""
    yield f"{'sent by the rank in a step':<32}{'bytes':>20}  {'':>10}  calls"
    for row in report["collectives"]:
        name = f"{row['axis']} {row['collective']}"
        yield f"  {name:<30}{row['bytes']:>20,}  {size(row['bytes']):>10}  {row['calls']:,}"
    total = sum(row["bytes"] for row in report["collectives"])
    yield f"  {'all':<30}{total:>20,}  {size(total):>10}"


def pipeline(report: dict[str, Any]) -> Iterator[str]:
    """Yields a line for every rank of a pipeline."""
    yield f"{'rank of the pipeline':<22}{'state':>12}{'in flight':>12}{'peak':>12}{'sent':>12}"
    for stage in report["stages"]:
        held = stage["memory"]
        state = held["parameters"] + held["gradients"] + held["optimizer"]
        sent = sum(row["bytes"] for row in stage["collectives"])
        cells = [size(state), size(held["in_flight"]), size(held["peak"]), size(sent)]
        yield f"  {stage['pipeline_rank']:<20}" + "".join(f"{cell:>12}" for cell in cells)


def times(report: dict[str, Any]) -> Iterator[str]:
    """Yields a line that says what the dry run took."""
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report["seconds"].items())
    yield f"dry run: {report['operators']:,} operators; {seconds}"


def size(count: int) -> str:
    """Writes bytes in the largest binary unit of which there is one: `3.4 GiB`."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:,.0f} {units[0]}" if units[0] == "B" else f"{amount:,.1f} {units[0]}"
