"""The verb `plan`: runs one rank of a job of any size on this CPU, without data, and reports its
memory and its communication."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.decoder import Decoder
from colonnade.models.shapes import measure
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.dry_run import Collectives, RankReport, dry_run, open_fake_world
from colonnade.parallel.mesh import build_expert_mesh, build_mesh
from colonnade.parallel.parallelize import parallelize
from colonnade.parallel.world import World


def plan(
    recipe: str | Path, overrides: Sequence[str] = (), *, gpus: int, dry_run: bool = True
) -> dict[str, Any]:
    """Runs one rank of the job of a recipe on `gpus` ranks without data; returns the report.

    Every rank holds and sends as much, up to the rounding of shards; the ends of a context group
    send less. Of a step one micro-batch is run. Parameters, gradients and the optimizer's state
    count once, activations once for every micro-batch in flight (one, without a pipeline); what a
    micro-batch sends counts once for each micro-batch.

    Args:
        recipe: a path, or the name of a shipped recipe.
        overrides: `field=value` each.
        gpus: ranks of the job.
        dry_run: as of now always.

    Raises:
        RecipeError: the recipe is invalid on that many ranks.
        UserError: without `dry_run`, for a pipeline, or in a process that has ranks already.
    """
    if not dry_run:
        raise UserError("plan: layouts are not ranked yet; add --dry-run to see this one")
    loaded = load_recipe(recipe, overrides, gpus)
    if loaded.parallel.pp > 1:
        raise UserError(
            f"parallel.pp = {loaded.parallel.pp}: a dry run has no pipelines yet; set parallel.pp "
            "to 1"
        )
    if dist.is_initialized():
        raise UserError(
            "plan: this process is a rank already, or has planned a job; a dry run needs a process "
            "of its own: use the command line, or start a new process"
        )
    start = time.perf_counter()
    world = open_fake_world(typical_rank(loaded.parallel, gpus), gpus)
    report, build_seconds = run_rank(loaded, world)
    seconds = {"build": build_seconds, **report.seconds, "total": time.perf_counter() - start}
    return as_dict(loaded, world, report, seconds)


def typical_rank(parallel: ParallelConfig, size: int) -> int:
    """The rank that is run: the first along all axes, whose shards are the largest, but for `cp`,
    along which it has neighbours on both sides."""
    degrees = parallel.degrees(size)
    return degrees["cp"] // 2 * degrees["tp"]


def run_rank(recipe: Recipe, world: World) -> tuple[RankReport, float]:
    """Builds the model of a rank as training does, and runs a step without data.

    Returns:
        the report, and the seconds that it took to build.
    """
    start = time.perf_counter()
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    mesh = build_mesh(recipe.parallel, world)
    expert_mesh = build_expert_mesh(recipe.parallel, world)
    with torch.device("meta"):
        model = Decoder(recipe.model, recipe.train.loss_chunk)
    parallelize(model, mesh, recipe, expert_mesh)
    seconds = time.perf_counter() - start
    return dry_run([model], mesh, expert_mesh, recipe), seconds


def as_dict(
    recipe: Recipe, world: World, report: RankReport, seconds: dict[str, float]
) -> dict[str, Any]:
    """The report of a plan, for JSON: bytes and seconds."""
    train, micro_batches = recipe.train, micro_batches_of(recipe, world.size)
    in_flight = 1
    return {
        "recipe": recipe.name,
        "ranks": world.size,
        "rank": world.rank,
        "layout": layout(recipe.parallel, world.size),
        "parameters": measure(recipe.model, train.seq_len).parameters,
        "precision": train.precision,
        "micro_batch": {"rows": train.micro_batch, "tokens": train.seq_len},
        "micro_batches": micro_batches,
        "in_flight": in_flight,
        "memory": {
            "parameters": report.parameters,
            "gradients": report.gradients,
            "optimizer": report.optimizer,
            "activations": report.peak.by_kind["activations"],
            "gathered": report.peak.by_kind["gathered"],
            "kept_by_forward": report.held,
            "update": report.update_peak.total,
            "peak": report.memory(in_flight),
        },
        "collectives": rows(report.collectives(micro_batches)),
        "per_micro_batch": rows(report.micro_batch),
        "per_step": rows(report.step),
        "operators": report.operators,
        "seconds": seconds,
    }


def micro_batches_of(recipe: Recipe, size: int) -> int:
    """Micro-batches of a step on every data-parallel rank, when the batch has its full size."""
    degrees = recipe.parallel.degrees(size)
    ranks = degrees["dp_replicate"] * degrees["dp_shard"]
    return recipe.train.global_batch // (recipe.train.micro_batch * ranks)


def layout(parallel: ParallelConfig, size: int) -> dict[str, int]:
    """The axes of both views that have several ranks, with their degrees."""
    degrees = parallel.degrees(size)
    if parallel.folds_experts:
        degrees |= parallel.expert_degrees(size)
    return {axis: degree for axis, degree in degrees.items() if degree > 1}


def rows(collectives: Collectives) -> list[dict[str, Any]]:
    """A row for every axis and collective."""
    return [
        {"axis": axis, "collective": name, "calls": traffic.calls, "bytes": traffic.bytes}
        for (axis, name), traffic in sorted(collectives.items())
    ]
