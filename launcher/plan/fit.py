"""Compares a plan with the memory of a device, and finds the smallest changes that make it fit."""

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

from colonnade.launcher.cluster.devices import RESERVE, Device
from colonnade.launcher.errors import UserError
from colonnade.launcher.plan.table import size
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.stages import recipe_of_stage
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.run import fields_of_init

Change = tuple[str, ...]  # overrides of the recipe
HELD = ("parameters", "gradients", "optimizer")
RECOMPUTE = ("none", "selective", "block")  # from the most memory to the least
DOUBLINGS = 4  # a degree is tried up to 16 times as large


class Fit(NamedTuple):
    """A change of the recipe, and the peak of the rank that holds the most, in bytes."""

    change: Change
    peak: int


def require_fit(
    report: dict[str, Any], device: Device, job: str, search: Callable[[], list[Fit]]
) -> None:
    """Checks that no rank of a plan holds more than a device has.

    Args:
        report: of the plan.
        device: of each rank.
        job: the recipe and its ranks, for people.
        search: finds changes that fit.

    Raises:
        UserError: a rank holds more; the message gives the parts, and what would fit.
    """
    held = report["memory"]
    if held["peak"] <= device.usable:
        return
    state = sum(held[kind] for kind in HELD)
    parts = ", ".join(f"{kind} {size(held[kind])}" for kind in HELD)
    what = (
        f"plan: {job}: rank {report['rank']:,} holds {size(held['peak'])} ({parts}, passes "
        f"{size(held['peak'] - state)}), and {device.name} has {size(device.usable)} to give: "
        f"{size(device.memory)} less {RESERVE:.0%} for the driver, communication and fragmentation."
    )
    if (ranks := ranks_for_state(report, device)) > report["ranks"]:
        raise UserError(
            f"{what} No layout of {report['ranks']:,} ranks fits: parameters, gradients and the "
            f"optimizer's state alone need {ranks:,} such devices when all ranks shard them"
        )
    fits = search()
    if not fits:
        raise UserError(
            f"{what} No change of one field of its layout fits, nor one together with "
            "train.recompute=block; use more ranks, or a device with more memory"
        )
    width = max(len(" ".join(fit.change)) for fit in fits)
    lines = (f"  {' '.join(fit.change):<{width}}  {size(fit.peak)}" for fit in fits)
    raise UserError("\n".join([f"{what} The nearest that fit:", *lines]))


def ranks_for_state(report: dict[str, Any], device: Device) -> int:
    """Returns how many devices hold parameters, gradients and optimizer state once, without the
    copies that layouts make of some parameters."""
    held = report["memory"]
    from colonnade.parallel.parallelize import storage_dtype  # imports torch

    itemsize = storage_dtype(report["precision"]).itemsize
    once = report["parameters"] * itemsize * sum(held[kind] for kind in HELD) / held["parameters"]
    return math.ceil(once / device.usable)


def nearest_fits(
    recipe: str | Path,
    overrides: Sequence[str],
    gpus: int,
    device: Device,
    stage: int | None = None,
) -> list[Fit]:
    """Returns the smallest change of each field that makes the job fit, the least memory first.

    Fields are recomputation, the place of its inputs, rows of a micro-batch, and the degrees, each
    doubled or halved until the job fits; of a recipe with training stages those of `stage`. Where
    none fits alone, each is tried again with whole blocks recomputed. Every try is a dry run in a
    process of its own.
    """
    whole = load_recipe(recipe, overrides, gpus, fields_of=fields_of_init)
    loaded, prefix = recipe_of_stage(whole, stage), f"stage.{stage}." if whole.stage else ""

    def named(rows: list[list[Change]]) -> list[list[Change]]:
        return [[tuple(f"{prefix}{field}" for field in c) for c in row] for row in rows]

    smallest = partial(first_fit, partial(peak_of, recipe, overrides, gpus, stage), device)
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        found = list(pool.map(smallest, named(changes(loaded, gpus))))
        if not any(found) and loaded.train.recompute != RECOMPUTE[-1]:
            train = loaded.train.model_copy(update={"recompute": RECOMPUTE[-1]})
            others = named(changes(loaded.model_copy(update={"train": train}), gpus))
            blocks = f"{prefix}train.recompute={RECOMPUTE[-1]}"
            found = list(pool.map(smallest, [[(blocks, *c) for c in row] for row in others]))
    return sorted((fit for fit in found if fit), key=lambda fit: fit.peak)


def changes(recipe: Recipe, gpus: int) -> list[list[Change]]:
    """Returns for each field the changes that may save memory, the smallest first."""
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
    peak: Callable[[Change], int | None], device: Device, row: Sequence[Change]
) -> Fit | None:
    """Returns the first change of a row that fits a device, or None."""
    for change in row:
        held = peak(change)
        if held is not None and held <= device.usable:
            return Fit(change, held)
    return None


def peak_of(
    recipe: str | Path, overrides: Sequence[str], gpus: int, stage: int | None, change: Change
) -> int | None:
    """Returns the peak of a changed recipe by a dry run in a process of its own, because a process
    has one world; None where the change is invalid.

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
    return json.loads(ran.stdout)["memory"]["peak"]
