"""One rank of a job, or one of each stage, built as training builds it, and run without data."""

import time

import torch
import torch.distributed as dist

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.decoder import Decoder
from colonnade.parallel.dry_run import RankReport, dry_run, open_fake_world
from colonnade.parallel.mesh import build_expert_mesh, build_mesh
from colonnade.parallel.parallelize import parallelize
from colonnade.parallel.pipeline.build import local_stages, pipeline_stages
from colonnade.parallel.pipeline.placement import Placement
from colonnade.parallel.world import World


def open_rank(rank: int, size: int) -> World:
    """Opens a world of ranks that do not exist.

    Raises:
        UserError: this process has ranks already.
    """
    if dist.is_initialized():
        raise UserError(
            "plan: this process is a rank already, or has planned a job; a dry run needs a process "
            "of its own: use the command line, or start a new process"
        )
    return open_fake_world(rank, size)


def run_rank(recipe: Recipe, world: World) -> list[RankReport]:
    """Builds the model of a rank, and runs a step without data; of a pipeline, one rank after the
    other along `pp`.

    Returns:
        the reports, one for each rank of the pipeline.
    """
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    mesh = build_mesh(recipe.parallel, world)
    expert_mesh = build_expert_mesh(recipe.parallel, world)
    stages = pipeline_stages(recipe.model, recipe.parallel, recipe.train.seq_len)
    reports: dict[int, RankReport] = {}
    # The rank of the last stage first: it alone knows all terms of the objective.
    ranks = range(recipe.parallel.pp)
    last = Placement.of(recipe.parallel).ranks[-1] if recipe.parallel.pp > 1 else 0
    for rank in sorted(ranks, key=lambda rank: rank != last):
        start = time.perf_counter()
        with torch.device("meta"):
            local = local_stages(stages, recipe.parallel, rank)
            model = Decoder(recipe.model, recipe.train.loss_chunk, local)
        parallelize(model, mesh, recipe, expert_mesh)
        build = {"build": time.perf_counter() - start}
        extras = reports[last].extras if last in reports else None
        report = dry_run(model, stages, mesh, expert_mesh, recipe, rank, extras)
        reports[rank] = report.with_seconds(build)
    return [reports[rank] for rank in ranks]
