"""Compares a plan with the memory of a device and of its host, and finds the smallest changes that
make it fit."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from colonnade.launcher.cluster.devices import HOST_RESERVE, RESERVE, Device
from colonnade.launcher.cluster.sizes import listed, size
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.hints import schema_of
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.stages import recipe_of_stage
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.run import fields_of_init

Change = tuple[str, ...]  # overrides of the recipe
HELD = ("parameters", "gradients", "optimizer")
RECOMPUTE = ("none", "selective", "block")  # from the most memory to the least
OFFLOAD = ("optimizer.offload=host", "optimizer.offload=interleaved")
DOUBLINGS = 4  # a degree is tried up to 16 times as large


class Held(NamedTuple):
    """The most bytes that a rank of a job holds: of its device's memory at the peak, and of its
    host's."""

    peak: int
    host: int

    @classmethod
    def of(cls, report: dict[str, Any]) -> "Held":
        """Reads them from the report of a plan."""
        hosts = (sum(stage["host"].values()) for stage in report["stages"])
        return cls(report["memory"]["peak"], max(hosts))

    def fits(self, device: Device) -> bool:
        """Whether a device has so much, and its host, as far as that is known."""
        of_host = device.usable_of_host
        return self.peak <= device.usable and (of_host is None or self.host <= of_host)


class Fit(NamedTuple):
    """A change of the recipe, and what the rank that holds the most then holds."""

    change: Change
    held: Held


class Lack(NamedTuple):
    """What a job lacks: memory of the device, of its host; and whether no change helps unless the
    optimizer's state is offloaded."""

    device: bool
    host: bool
    offload: bool = False


def require_fit(
    report: dict[str, Any], device: Device, job: str, search: Callable[[Lack], list[Fit]]
) -> None:
    """Checks that no rank of a plan holds more than a device has, and its host.

    Args:
        report: of the plan.
        device: of each rank.
        job: the recipe and its ranks, for people.
        search: finds changes that fit.

    Raises:
        UserError: a rank holds more; the message gives the parts, and what would fit.
    """
    of_device, of_host = list(device_lacks(report, device)), list(host_lacks(report, device))
    if not of_device and not of_host:
        return
    what = f"plan: {job}: {' '.join(of_device + of_host)}"
    ranks = ranks_for_state(report, device)
    if ranks > report["ranks"]:
        with_offload = ranks_for_offloaded(report, device)
        if with_offload is None or with_offload > report["ranks"]:
            offloaded = f", or {with_offload:,} with {OFFLOAD[0]}" if with_offload else ""
            raise UserError(
                f"{what} No layout of {report['ranks']:,} ranks fits: parameters, gradients and "
                f"the optimizer's state alone need {ranks:,} such devices when all ranks shard "
                f"them{offloaded}"
            )
    if fits := search(Lack(bool(of_device), bool(of_host), ranks > report["ranks"])):
        raise UserError("\n".join([f"{what} The nearest that fit:", *lines_of(fits, device)]))
    raise UserError(
        f"{what} No change of one field fits, nor one together with "
        f"{' or '.join([f'train.recompute={RECOMPUTE[-1]}', *OFFLOAD[:1]])}; use more ranks, or a "
        "device with more memory"
    )


def device_lacks(report: dict[str, Any], device: Device) -> Iterator[str]:
    """Yields a sentence on a device that has too little memory, with the parts."""
    held = report["memory"]
    if held["peak"] <= device.usable:
        return
    state = sum(held[kind] for kind in HELD)
    yield (
        f"rank {report['rank']:,} holds {size(held['peak'])} "
        f"({listed({kind: held[kind] for kind in HELD})}, passes {size(held['peak'] - state)}), "
        f"and {device.name} has {size(device.usable)} to give: {size(device.memory)} less "
        f"{RESERVE:.0%} for the driver, communication and fragmentation."
    )


def host_lacks(report: dict[str, Any], device: Device) -> Iterator[str]:
    """Yields a sentence on a host that has too little memory for each rank, with the parts."""
    parts = max((stage["host"] for stage in report["stages"]), key=lambda host: sum(host.values()))
    total, usable = sum(parts.values()), device.usable_of_host
    if usable is None or total <= usable:
        return
    assert device.host_memory is not None
    yield (
        f"In its host's memory a rank holds {size(total)} ({listed(parts)}), and the host of "
        f"{device.name} has {size(usable)} to give for each device: {size(device.host_memory)} "
        f"less {HOST_RESERVE:.0%} for the system, data and communication."
    )


def lines_of(fits: Sequence[Fit], device: Device) -> Iterator[str]:
    """Yields a line for each change that fits, with what a rank then holds."""
    width = max(len(" ".join(fit.change)) for fit in fits)
    for change, held in fits:
        of_host = "" if device.host_memory is None else f", {size(held.host)} of its host"
        yield f"  {' '.join(change):<{width}}  {size(held.peak)}{of_host}"


def ranks_for_state(report: dict[str, Any], device: Device) -> int:
    """Returns how many devices hold parameters, gradients and optimizer state once, without the
    copies that layouts make of some parameters."""
    held = report["memory"]
    once = report["parameters"] * sum(held[kind] for kind in HELD) / report["elements"]
    return math.ceil(once / device.usable)


def ranks_for_offloaded(report: dict[str, Any], device: Device) -> int | None:
    """Returns the same where the host has the optimizer's state, so that devices hold weights in
    the compute dtype and gradients; None if it has already, or the optimizer cannot be offloaded.
    """
    from colonnade.parallel.parallelize import COMPUTE, storage_dtype  # imports torch

    if report["offload"] != "none" or report["optimizer"] != "adamw":
        return None
    precision = report["precision"]
    bytes_of_one = COMPUTE[precision].itemsize + storage_dtype(precision).itemsize
    return math.ceil(report["parameters"] * bytes_of_one / device.usable)


def nearest_fits(
    recipe: str | Path,
    overrides: Sequence[str],
    gpus: int,
    device: Device,
    stage: int | None,
    lack: Lack,
) -> list[Fit]:
    """Returns the smallest change of each field that makes the job fit, the least memory first.

    Fields are those of `changes`, or of `changes_of_host` where a host lacks memory, numbers being
    doubled or halved until the job fits; of a recipe with training stages those of `stage`. Where
    none fits alone, each is tried again with whole blocks recomputed, and then with the optimizer's
    state on the host. Every try is a dry run in a process of its own.
    """
    whole = load_recipe(recipe, overrides, gpus, fields_of=fields_of_init)
    loaded, prefix = recipe_of_stage(whole, stage), f"stage.{stage}." if whole.stage else ""

    def named(change: Change) -> Change:
        whole_run = "checkpoint."  # a table that stages do not have
        return tuple(f if f.startswith(whole_run) else f"{prefix}{f}" for f in change)

    smallest = partial(first_fit, partial(held_by, recipe, overrides, gpus, stage), device)
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for before in beginnings(loaded, lack):
            rows = joined(before, (changes_of_host if lack.host else changes)(loaded, gpus))
            rows += [[(field,)] for field in OFFLOAD] if before == OFFLOAD[:1] else []
            found = list(pool.map(smallest, [[named(c) for c in row] for row in rows]))
            if any(found):
                break
    return sorted((fit for fit in found if fit), key=lambda fit: fit.held)


def beginnings(recipe: Recipe, lack: Lack) -> Iterator[Change]:
    """Yields what is changed together with one field, until something fits."""
    block = f"train.recompute={RECOMPUTE[-1]}"
    blocks = () if recipe.train.recompute == RECOMPUTE[-1] or not lack.device else (block,)
    begin = OFFLOAD[:1] if lack.offload else ()
    if not (blocks and lack.host):  # no field alone saves memory of both
        yield begin
    if blocks:
        yield (*begin, *blocks)
    if recipe.optimizer.offload == "none" and not lack.offload and not lack.host:
        yield (*blocks, *OFFLOAD[:1])


def joined(before: Change, rows: list[list[Change]]) -> list[list[Change]]:
    """Returns rows of changes together with another one, but for those of its fields."""
    changed = fields_in(before)
    return [[(*before, *c) for c in row] for row in rows if not changed & fields_in(*row)]


def fields_in(*of: Change) -> set[str]:
    """Returns the names of the fields that are changed."""
    return {field.partition("=")[0] for change in of for field in change}


def changes(recipe: Recipe, gpus: int) -> list[list[Change]]:
    """Returns for each field the changes that may save memory of the device, the smallest first:
    recomputation, rows of a micro-batch, degrees of the layout, offload."""
    train, parallel = recipe.train, recipe.parallel
    more = RECOMPUTE[RECOMPUTE.index(train.recompute) + 1 :]
    offloads = train.recompute != RECOMPUTE[0] and not train.offload_inputs
    rows = [train.micro_batch >> n for n in range(1, DOUBLINGS + 1)]
    found: list[list[Change]] = [
        [(f"train.recompute={kind}",) for kind in more],
        [("train.offload_inputs=true",)] if offloads else [],
        [(f"train.micro_batch={count}",) for count in rows if count],
    ]
    degrees = parallel.degrees(gpus)
    explicit = parallel.dp_shard is not None
    found.append(list(moved_ranks("dp_replicate", "dp_shard", degrees, explicit)))
    for axis in ("tp", "cp", "pp"):
        found.append(list(moved_ranks("dp_shard", axis, degrees, explicit)))
    found.append([(f"parallel.ep={parallel.ep << n}",) for n in range(1, DOUBLINGS + 1)])
    if recipe.optimizer.offload == "none":
        found += [[(field,)] for field in OFFLOAD]
    return found


def changes_of_host(recipe: Recipe, gpus: int) -> list[list[Change]]:
    """Returns for each field the changes that may save memory of the host, the smallest first:
    fewer replicas of the state, narrower state, none, and no copies for saving."""
    degrees, optimizer = recipe.parallel.degrees(gpus), recipe.optimizer
    explicit = recipe.parallel.dp_shard is not None
    found = [list(moved_ranks("dp_replicate", "dp_shard", degrees, explicit))]
    if optimizer.offload != "none":
        found.append([("optimizer.offload=none",)])
        for name in ("offload_moments", "offload_gradients"):
            kinds = (schema_of(("optimizer", name)) or {})["enum"]  # from the widest on
            narrower = kinds[kinds.index(getattr(optimizer, name)) + 1 :]
            found.append([(f"optimizer.{name}={kind}",) for kind in narrower])
    if recipe.checkpoint.asynchronous:
        found.append([("checkpoint.asynchronous=false",)])
    return found


def moved_ranks(
    source: str, target: str, degrees: dict[str, int], explicit: bool
) -> Iterator[Change]:
    """Yields changes that move ranks from one axis to another.

    Args:
        source: the axis whose degree becomes smaller.
        target: the axis whose degree becomes larger.
        degrees: of the layout.
        explicit: whether the recipe sets `dp_shard`; otherwise that follows.
    """
    for factor in (2**n for n in range(1, DOUBLINGS + 1)):
        if degrees[source] % factor == 0:
            changed = {source: degrees[source] // factor, target: degrees[target] * factor}
            yield tuple(
                f"parallel.{axis}={degree}"
                for axis, degree in changed.items()
                if explicit or axis != "dp_shard"
            )


def first_fit(
    held_by: Callable[[Change], Held | None], device: Device, row: Sequence[Change]
) -> Fit | None:
    """Returns the first change of a row that fits a device and its host, or None."""
    for change in row:
        held = held_by(change)
        if held is not None and held.fits(device):
            return Fit(change, held)
    return None


def held_by(
    recipe: str | Path, overrides: Sequence[str], gpus: int, stage: int | None, change: Change
) -> Held | None:
    """Returns what a rank of a changed recipe holds, by a dry run in a process of its own, because
    a process has one world; None where the change is invalid.

    Raises:
        RuntimeError: the dry run failed.
    """
    changed = [*overrides, *change]
    try:
        load_recipe(recipe, changed, gpus, fields_of=fields_of_init)
    except UserError:  # this recipe does not admit it: not one of the remedies
        return None
    command = [sys.executable, "-m", "colonnade.launcher", "plan", str(recipe), *changed]
    command += ["--gpus", str(gpus), "--dry-run", "--json", "-"]
    command += [] if stage is None else ["--stage", str(stage)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"the dry run with {' '.join(change)} failed:\n{ran.stderr}")
    return Held.of(json.loads(ran.stdout))
