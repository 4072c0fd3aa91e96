"""Takes part in a training job as one of its ranks."""

import os
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.environment import (
    RankEnvironment,
    advice_on_restarts,
    has_agent,
    restart_count,
    time_collectives,
)
from colonnade.launcher.cluster.products import settle_products
from colonnade.launcher.cluster.ranks import SINGLE_PROCESS, end_with_launcher, prepare_rank
from colonnade.launcher.cluster.rendezvous import connect
from colonnade.launcher.cluster.startup import Startup
from colonnade.launcher.data import prepare_data
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import COMING
from colonnade.launcher.train.attempt import attempt_of, own_output
from colonnade.launcher.train.folder import OpenRun, ResumePoint, newest_step
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.order import OpenFolder, Order
from colonnade.launcher.train.run import Run
from colonnade.parallel.world import open_world


def train_as_rank(
    recipe: Recipe,
    environment: RankEnvironment,
    open_folder: OpenFolder,
    order: Order,
    launched: float | None = None,
) -> Run:
    """Trains as one rank. Rank 0 opens the run's folder, the first rank of each host prepares data.

    `launched` is when our own launcher was started, if it has started this rank: the launcher has
    prepared the data, and announces signals to the user.
    """
    startup, started = Startup(launched), launched is not None
    startup.mark("imports")
    if not started and has_agent():
        end_with_launcher()
    device = prepare_rank(environment, recipe.train.device, recipe.train.compile)
    if device.type == "cuda" and environment.size > 1 and recipe.monitor.ranks_every:
        time_collectives()
    store, timeout = connect(environment, device), recipe.parallel.timeout
    with (
        ExitStack() as folders,
        open_world(environment.rank, environment.size, device, store, timeout) as world,
    ):
        startup.mark("ranks")
        settle_products(device)
        if world.is_rank_zero and not started and (advice := advice_on_restarts()):
            print(f"colonnade: {advice}", file=sys.stderr, flush=True)
        if not started:
            prepares = environment.local_rank == 0
            on_all_ranks(
                lambda: prepare_data(recipe, order.step) if prepares else None, world.wait_for_all
            )
        startup.mark("data")
        run = on_rank_zero(lambda: folders.enter_context(open_folder()))
        attempt = attempt_of(run.path, world, startup, started)
        order = order._replace(command=order.command or sys.argv)
        reporter = attempt.reporter
        with reporter.reporting(), own_output(run.path, attempt), reporter.watching():
            number = run_job(recipe, run.path, world, run.resume, order, attempt)
    return Run(run.path, 128 + number if number else 0)


def open_again(opened: OpenRun) -> tuple[OpenRun, ResumePoint, int]:
    """Returns a run's folder that a failed attempt had opened, from where it goes on, and its step:
    from the newest checkpoint that is whole, if there is one."""
    coming = opened.resume and (opened.path / COMING).exists()  # no checkpoint was loaded yet
    step = newest_step(opened.path)
    again = opened._replace(resume=step > 0, adopted=not coming)
    return again, ResumePoint(None, automatic=True), step


def train_started_rank(
    run: str,
    resume: bool,
    source: list[Any],
    until: int | None,
    step: int,
    command: list[str],
    launched: float,
    parent: int,
) -> None:
    """Trains as a rank that `start` started: the run's folder and the data are prepared."""
    if os.getppid() != parent:
        raise SystemExit(1)  # the launcher ended before this rank could ask to end with it
    opened, point = OpenRun(Path(run), resume), ResumePoint(*source)
    if restart_count():
        opened, point, step = open_again(opened)
    environment = RankEnvironment.from_environment() or SINGLE_PROCESS
    recipe = load_recipe(opened.recipe, world_size=environment.size, step=step)
    order = Order(point, until, step, command=command)
    train_as_rank(recipe, environment, lambda: nullcontext(opened), order, launched)
