"""The verb `plan`: runs one rank of a job of any size on this CPU, without data, and reports its
memory and its communication."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.shapes import measure
from colonnade.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from colonnade.parallel.dry_run import RankReport, Traffic


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
    # Only now, so that a mistake is reported before torch would be imported.
    from colonnade.launcher.plan.rank import open_rank, run_rank

    rank = typical_rank(loaded.parallel, gpus)
    return as_dict(loaded, gpus, rank, run_rank(loaded, open_rank(rank, gpus)))


def typical_rank(parallel: ParallelConfig, size: int) -> int:
    """The rank that is run: the first along all axes, whose shards are the largest, but for `cp`,
    along which it has neighbours on both sides."""
    degrees = parallel.degrees(size)
    return degrees["cp"] // 2 * degrees["tp"]


def as_dict(recipe: Recipe, ranks: int, rank: int, report: "RankReport") -> dict[str, Any]:
    """The report of a plan, for JSON: bytes and seconds."""
    train, micro_batches = recipe.train, micro_batches_of(recipe, ranks)
    in_flight = 1
    return {
        "recipe": recipe.name,
        "ranks": ranks,
        "rank": rank,
        "layout": layout(recipe.parallel, ranks),
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
        "seconds": report.seconds,
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


def rows(collectives: Mapping[tuple[str, str], "Traffic"]) -> list[dict[str, Any]]:
    """A row for every axis and collective."""
    return [
        {"axis": axis, "collective": name, "calls": traffic.calls, "bytes": traffic.bytes}
        for (axis, name), traffic in sorted(collectives.items())
    ]
