"""The verb `plan`: runs one rank of a job of any size on this CPU, without data, and reports its
memory and its communication."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.launcher.cluster.devices import GIB, parse_device
from colonnade.launcher.errors import UserError
from colonnade.launcher.plan.fit import nearest_fits, require_fit
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.stages import recipe_of_stage
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.run import fields_of_init
from colonnade.models.shapes import measure
from colonnade.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from colonnade.parallel.dry_run import RankReport, Traffic


def plan(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int,
    dry_run: bool = True,
    device: str | None = None,
    host_memory: float | None = None,
    stage: int | None = None,
) -> dict[str, Any]:
    """Runs one rank of the job of a recipe on `gpus` ranks without data; returns the report.

    Of a pipeline it runs one rank of each stage. Along the other axes every rank holds and sends as
    much, up to the rounding of shards; the ends of a context group send less. Of a step one
    micro-batch is run. Parameters, gradients and the optimizer's state count once, what forward
    passes keep for backward as often as the schedule has passes in flight; what a micro-batch sends
    counts once for each micro-batch.

    Args:
        recipe: a path, or the name of a shipped recipe.
        overrides: `field=value` each.
        gpus: ranks of the job.
        dry_run: as of now always.
        stage: of a recipe with training stages, the one that is run.
        device: that each rank has: a name, or its memory, such as `80GiB`; None: any.
        host_memory: GiB of its host's memory for each device; None: as far as it is known.

    Raises:
        RecipeError: the recipe is invalid on that many ranks.
        UserError: without `dry_run`, in a process that has ranks already, or because a rank holds
            more than the device, or its host, has; the message then gives the nearest layouts that
            fit.
    """
    if not dry_run:
        raise UserError("plan: layouts are not ranked yet; add --dry-run to see this one")
    known = parse_device(device, host_memory)
    whole = load_recipe(recipe, overrides, gpus, fields_of=fields_of_init)
    loaded = recipe_of_stage(whole, stage)
    stage = (stage or 0) if whole.stage else None
    # Only now, so that a mistake is reported before torch would be imported.
    from colonnade.launcher.plan.rank import open_rank, run_rank

    rank = typical_rank(loaded.parallel, gpus)
    report = as_dict(loaded, gpus, rank, run_rank(loaded, open_rank(rank, gpus)))
    if known is not None:
        job = f"{loaded.name} on {gpus:,} rank{'s' * (gpus > 1)}"
        require_fit(
            report, known, job, partial(nearest_fits, recipe, overrides, gpus, known, stage)
        )
        report["device"] = {
            "name": known.name,
            "memory": known.memory,
            "usable": known.usable,
            "host_memory": known.host_memory,
            "usable_of_host": known.usable_of_host,
        }
    return report


def typical_rank(parallel: ParallelConfig, size: int) -> int:
    """Returns the rank that is run: the first along all axes, whose shards are the largest, but for
    `cp`, along which it has ranks with other segments on both sides."""
    degrees = parallel.degrees(size)
    return degrees["cp"] // 2 * degrees["tp"]


def as_dict(
    recipe: Recipe, ranks: int, rank: int, reports: Sequence["RankReport"]
) -> dict[str, Any]:
    """Returns the report of a plan for JSON, in bytes and seconds.

    `reports` are those of the ranks of the pipeline, in `stages`; the rank that holds the most is
    at the top as well.
    """
    train, micro_batches = recipe.train, micro_batches_of(recipe, ranks)
    stages = [
        stage_dict(recipe, number, report, micro_batches) for number, report in enumerate(reports)
    ]
    largest = max(stages, key=lambda stage: stage["memory"]["peak"])
    seconds: dict[str, float] = {}
    for report in reports:
        for phase, value in report.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    return {
        "recipe": recipe.name,
        "ranks": ranks,
        "rank": rank + largest["pipeline_rank"] * ranks // recipe.parallel.pp,
        "layout": recipe.parallel.layout(ranks),
        "schedule": recipe.parallel.schedule if recipe.parallel.pp > 1 else None,
        "parameters": measure(recipe.model, train.seq_len).parameters,
        "precision": train.precision,
        "optimizer": recipe.optimizer.name,
        "offload": recipe.optimizer.offload,
        "margin": int(recipe.optimizer.margin * GIB),
        "micro_batch": {"rows": train.micro_batch, "tokens": train.seq_len},
        "micro_batches": micro_batches,
        **largest,
        "operators": sum(report.operators for report in reports),
        "seconds": seconds,
        "stages": stages,
    }


def stage_dict(
    recipe: Recipe, number: int, report: "RankReport", micro_batches: int
) -> dict[str, Any]:
    """Returns what one rank of a pipeline, or of a job without one, holds and sends, in bytes."""
    from colonnade.parallel.pipeline.dry_run import in_flight

    kept, passes = in_flight(recipe.parallel, number, micro_batches, report.held)
    return {
        "pipeline_rank": number,
        "in_flight": passes,
        "elements": report.elements,
        "memory": {
            "parameters": report.parameters,
            "gradients": report.gradients,
            "optimizer": report.optimizer,
            "activations": report.peak.by_kind["activations"],
            "gathered": report.peak.by_kind["gathered"],
            "kept_by_forward": sum(report.held.values()),
            "in_flight": kept,
            "update": report.update_peak.total,
            "summed_gradients": report.summed if micro_batches > 1 else 0,
            "peak": report.memory(kept, micro_batches),
        },
        **host_dict(
            recipe, report, in_flight(recipe.parallel, number, micro_batches, report.stashed)[0]
        ),
        "collectives": rows(report.collectives(micro_batches)),
        "per_micro_batch": rows(report.micro_batch),
        "per_step": rows(report.step),
    }


def host_dict(recipe: Recipe, report: "RankReport", inputs: int) -> dict[str, Any]:
    """Returns what a rank holds in its host's memory, by kind, `inputs` of sub-blocks and norms
    among it, and facts of the state there:
    gradients that stay on the device to the end of backward, from the second step on; its slots for
    state, of which there are more where memory is free; and groups of parameters."""
    saves = report.saved if recipe.checkpoint.asynchronous else 0
    others, state = {"inputs": inputs, "saved_copies": saves}, report.offload
    if state is None:
        return {"host": others, "offloaded": None}
    return {
        "host": {**state.host, **others},
        "offloaded": {
            "kept_gradients": state.kept,
            "slot": state.slot,
            "slots": min(state.device_groups, 2),
            "more_slots": not recipe.train.deterministic,
            "groups": state.groups,
            "device_groups": state.device_groups,
        },
    }


def micro_batches_of(recipe: Recipe, size: int) -> int:
    """Returns the number of micro-batches of a step on every data-parallel rank, when the batch has
    its full size."""
    degrees = recipe.parallel.degrees(size)
    ranks = degrees["dp_replicate"] * degrees["dp_shard"]
    return recipe.train.passes_of_rank(recipe.train.global_batch, ranks)


def rows(collectives: Mapping[tuple[str, str], "Traffic"]) -> list[dict[str, Any]]:
    """Returns a row for every axis and collective."""
    return [
        {"axis": axis, "collective": name, "calls": traffic.calls, "bytes": traffic.bytes}
        for (axis, name), traffic in sorted(collectives.items())
    ]
