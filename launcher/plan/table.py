"""Formats the report of `plan` for people."""

from collections.abc import Iterator
from typing import Any

from colonnade.launcher.cluster.sizes import size

STATE = {
    "parameters": "shards of parameters and buffers",
    "gradients": "shards of their gradients",
    "optimizer": "optimizer state",
}
HOST = {
    "masters": "master weights",
    "moments": "moments of AdamW",
    "gradients": "gradients on their way to the host",
    "weights": "rounded weights on their way to the device",
    "inputs": "stashed inputs of sub-blocks and norms (train.offload_inputs)",
    "widened": "wide copies of moments, from a save to the next update",
    "saved_copies": "copies of what the rank saves (checkpoint.asynchronous)",
}
PASSES = {
    "activations": "activations, at the peak of a micro-batch's forward and backward pass",
    "gathered": "weights that FSDP has gathered then, and its buffers",
}


def table(report: dict[str, Any]) -> str:
    """Returns the report as text."""
    parts = [heading(report), memory(report), host(report), communication(report)]
    parts += [pipeline(report)] if len(report["stages"]) > 1 else []
    texts = ["\n".join(part) for part in [*parts, times(report)]]
    return "\n\n".join(text for text in texts if text)


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
    """Yields lines of the bytes that the rank holds on its device."""
    held, offloaded = report["memory"], report["offloaded"]
    yield f"{'held by the rank':<32}{'bytes':>20}"
    for key, text in {**STATE, **PASSES}.items():
        if offloaded is not None and key == "optimizer":
            yield from slots(report)
        else:
            remark = f", {leaving(report)}" if offloaded is not None and key == "gradients" else ""
            yield line(key, held[key], text + remark)
    in_flight = report["in_flight"]
    flight = f"{in_flight} forward pass{'es' * (in_flight > 1)} in flight"
    yield line("peak", held["peak"], f"with {flight}")
    if device := report.get("device"):
        others = f"beside {size(device['memory'] - device['usable'])} for driver and communication"
        yield line(f"left of {device['name']}", device["usable"] - held["peak"], others)


def leaving(report: dict[str, Any]) -> str:
    """Says when the device has all gradients, of which the host updates some."""
    kept = report["offloaded"]["kept_gradients"]
    stay = f"{size(kept) if kept else 'none'} stay for the update"
    if report["micro_batches"] > 1:
        return f"until the last micro-batch; {stay}, in the first step all"
    return f"in the first step; in later ones {stay}"


def slots(report: dict[str, Any]) -> Iterator[str]:
    """Yields a line of the device's memory for the state that it updates, if there is any."""
    state = report["offloaded"]
    if not state["slots"]:
        return
    text = f"{state['slots']} slots during updates, for the state of {state['device_groups']} of "
    text += f"{state['groups']} groups in turn"
    if state["more_slots"]:
        text += f"; more where memory is free beside a margin of {size(report['margin'])}"
    yield line("slots", state["slots"] * state["slot"], text)


def host(report: dict[str, Any]) -> Iterator[str]:
    """Yields lines of the bytes that the rank holds in its host's memory, if there are any."""
    held = {kind: count for kind, count in report["host"].items() if count}
    if not held:
        return
    yield f"{'held by the rank on its host':<32}{'bytes':>20}"
    for kind, count in held.items():
        yield line(kind.replace("_", " "), count, HOST[kind])
    total = sum(held.values())
    yield line("all", total, "beside the program, data and buffers of communication")
    usable = report.get("device", {}).get("usable_of_host")
    if usable is not None:
        name = report["device"]["name"]
        yield line(f"left of the host of {name}", usable - total, "for each of its devices")


def line(name: str, count: int, text: str) -> str:
    """Returns a line of bytes."""
    return f"  {name:<30}{count:>20,}  {size(count):>10}  {text}"


def communication(report: dict[str, Any]) -> Iterator[str]:
    """Yields a line for every axis and collective: the bytes that the rank sends."""
    yield f"{'sent by the rank in a step':<32}{'bytes':>20}  {'':>10}  calls"
    for row in report["collectives"]:
        yield line(f"{row['axis']} {row['collective']}", row["bytes"], f"{row['calls']:,}")
    total = sum(row["bytes"] for row in report["collectives"])
    yield line("all", total, "").rstrip()


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
