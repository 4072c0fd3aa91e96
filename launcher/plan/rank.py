"""One rank of a job, built as training builds it, and run without data."""

import time

import torch
import torch.distributed as dist

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.decoder import Decoder
from colonnade.parallel.dry_run import RankReport, dry_run, open_fake_world
from colonnade.parallel.mesh import build_expert_mesh, build_mesh
from colonnade.parallel.parallelize import parallelize
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


def run_rank(recipe: Recipe, world: World) -> RankReport:
    """Builds the model of a rank, all of it in one stage, and runs a step without data."""
    start = time.perf_counter()
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    mesh = build_mesh(recipe.parallel, world)
    expert_mesh = build_expert_mesh(recipe.parallel, world)
    with torch.device("meta"):
        model = Decoder(recipe.model, recipe.train.loss_chunk)
    parallelize(model, mesh, recipe, expert_mesh)
    build = {"build": time.perf_counter() - start}
    report = dry_run([model], mesh, expert_mesh, recipe)
    return report.with_seconds(build)
