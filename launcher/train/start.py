"""The ranks of a run: started on this host, or joined as one that torchrun or srun started."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

from colonnade.launcher.checkpoint import newest
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.doctor import check_compiling
from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.products import settle_products
from colonnade.launcher.cluster.ranks import (
    ALONE,
    choose_device,
    settle_memory,
    settle_threads,
    start_ranks,
)
from colonnade.launcher.data import prepare_data
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.folder import COMING, RECIPE
from colonnade.launcher.train.job import run_job
from colonnade.launcher.train.run import Run
from colonnade.parallel.world import world


def start(
    recipe: Recipe,
    place: RankEnvironment | None,
    nproc: int,
    open_folder: Callable[[], AbstractContextManager[Path]],
    again: bool,
    until: int | None,
) -> Run:
    """Run as a rank of a job, alone, or start ranks and wait for them."""
    if place is not None and place.from_srun and nproc > 1:
        raise UserError(
            f"--nproc {nproc}: srun has started {place.size} tasks, which are the ranks; leave "
            "--nproc out, and give srun one task per rank"
        )
    if place is not None or nproc == 1:
        return be_rank(recipe, place or ALONE, open_folder, again, until)
    device = choose_device(recipe.train.device, RankEnvironment(0, nproc, 0, nproc))
    check_compiling(recipe.train.compile, device)
    prepare_data(recipe)
    with open_folder() as path:
        before = newest(path / "checkpoints")
        print(f"starting    {nproc} ranks on {device.type}", flush=True)
        options = ["--again"] * again + (["--until", str(until)] if until else [])
        status = start_ranks(["_rank", str(path), *options], nproc)
        if status and newest(path / "checkpoints") == before:
            print("colonnade: stopped before a new checkpoint was complete", file=sys.stderr)
    return Run(path, status)


def be_rank(
    recipe: Recipe,
    place: RankEnvironment,
    open_folder: Callable[[], AbstractContextManager[Path]],
    again: bool,
    until: int | None,
    started: bool = False,
) -> Run:
    """Take part as one rank. Rank 0 opens the run's folder, the first of each host prepares data.

    `started` says that our own launcher started this rank: it has prepared the data, and answers
    signals.
    """
    settle_threads(place)
    device = choose_device(recipe.train.device, place)
    check_compiling(recipe.train.compile, device)
    settle_memory(device)
    with (
        ExitStack() as folders,
        world(place.rank, place.size, device, timeout=recipe.parallel.timeout) as here,
    ):
        settle_products(device)
        if not started:
            first = place.local_rank == 0
            on_all_ranks(lambda: prepare_data(recipe) if first else None, here.meet)
        path = on_rank_zero(lambda: folders.enter_context(open_folder()))
        answers = place.rank == 0 and not started
        number = run_job(recipe, path, here, again, until, answers)
    return Run(path, 128 + number if number else 0)


def be_started_rank(path: Path, again: bool, until: int | None) -> None:
    """A rank that `start` launched: the folder and the data are there."""
    place = RankEnvironment.from_environment() or ALONE
    recipe = load_recipe(path / (COMING if again else RECIPE), world_size=place.size)
    be_rank(recipe, place, lambda: nullcontext(path), again, until, started=True)
