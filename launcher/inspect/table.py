"""Formats the reports of `inspect` for people."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colonnade.launcher.checkpoint.folders import step_of

OPTIMIZER = "optimizer."


def table(report: dict[str, Any]) -> str:
    """Returns the report on one checkpoint as text."""
    return "\n".join([*heading(report), "", *files(report), "", *tensors(report["tensors"])])


def heading(report: dict[str, Any]) -> Iterator[str]:
    """Yields the lines on the checkpoint as a whole."""
    about = dict(report["about"])
    yield report["checkpoint"]
    named = step_of(Path(report["checkpoint"]))
    if named is not None and "step" in about and about["step"] != named:
        yield f"  the folder is named as step {named}, and holds step {about['step']}"
    if layout := about.pop("layout", None):
        about["layout"] = ", ".join(f"{a} {d}" for a, d in layout.items() if d > 1) or "one rank"
    if (seconds := about.pop("time", None)) is not None:
        about["written"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    for key, value in about.items():
        yield f"  {key:<14}{', '.join(value) if isinstance(value, list) else value}"


def files(report: dict[str, Any]) -> Iterator[str]:
    """Yields a line for every file, and one that says whether all are whole."""
    checked = report["kind"] == "colonnade"
    yield f"{'file':<32}{'bytes':>16}  checksum"
    for name, file in report["files"].items():
        mark = f"DAMAGED: {file['damage']}" if "damage" in file else "ok" if checked else ""
        yield f"  {name:<30}{file['bytes']:>16,}  {file['checksum']}  {mark}".rstrip()
    damaged = sum("damage" in file for file in report["files"].values())
    if damaged:
        yield f"  {damaged} of {len(report['files'])} files are damaged"
    elif not checked:
        yield "  such folders record no checksums to compare with"


def tensors(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields a line for every tensor of the model, and one for each kind of optimizer state."""
    state: dict[str, list[dict[str, Any]]] = {}
    yield f"{'tensor':<44}{'dtype':>10}{'chunks':>8}  shape"
    for name, tensor in found.items():
        if name.startswith(OPTIMIZER):
            state.setdefault(name.rpartition(".")[2], []).append(tensor)
            continue
        yield f"  {name:<42}{tensor['dtype']:>10}{tensor['chunks']:>8}  {shape(tensor['shape'])}"
    for kind, of_kind in state.items():
        dtypes = "/".join(sorted({tensor["dtype"] for tensor in of_kind}))
        count = f"optimizer {kind} of {len(of_kind)} parameters"
        yield f"  {count:<42}{dtypes:>10}{sum(t['chunks'] for t in of_kind):>8}"
    model = [tensor["bytes"] for name, tensor in found.items() if not name.startswith(OPTIMIZER)]
    total = sum(tensor["bytes"] for tensor in found.values())
    yield f"  {len(found):,} tensors, {total:,} bytes, {sum(model):,} of them the model's"


def shape(sizes: Sequence[int]) -> str:
    """Formats a shape: `[4, 5]`."""
    return f"[{', '.join(map(str, sizes))}]"


def difference_table(report: dict[str, Any]) -> str:
    """Returns the report on two checkpoints as text."""
    first, second = report["checkpoints"]
    lines = [f"first   {first}", f"second  {second}", ""]
    for key, (one, other) in [*report["about"].items(), *report["state"].items()]:
        lines.append(f"  {key}: {one} | {other}")
    for which in ("first", "second"):
        lines += [f"  only in the {which}: {name}" for name in report[f"only_in_{which}"]]
    lines += [f"  {name}: {difference(found)}" for name, found in report["differ"].items()]
    differ = len(report["differ"]) + len(report["only_in_first"]) + len(report["only_in_second"])
    lines.append(f"{report['equal_tensors']:,} tensors are equal, {differ:,} are not")
    return "\n".join(lines)


def difference(found: dict[str, Any]) -> str:
    """Formats how a tensor differs."""
    parts = [
        f"{key} {shape(pair[0]) if key == 'shape' else pair[0]} | "
        f"{shape(pair[1]) if key == 'shape' else pair[1]}"
        for key, pair in found.items()
        if key in ("shape", "dtype")
    ]
    if "not_a_number" in found:
        parts.append(f"{found['not_a_number']:,} differences are not numbers")
    if "bits_only" in found:
        parts.append("equal numbers, other bits (the sign of a zero)")
    if "largest" in found:
        relative = found["relative"]
        text = f"{found['elements']:,} elements, by at most {found['largest']:.3g}"
        parts.append(text if relative is None else f"{text}, {relative:.3g} of the norm")
    return "; ".join(parts)
