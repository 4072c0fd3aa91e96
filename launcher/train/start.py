"""Runs a training job's ranks: starts them on this host, or takes part as one of them."""

import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from colonnade.launcher.checkpoint import newest
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.environment import (
    RankEnvironment,
    advice_on_restarts,
    has_agent,
    restart_count,
)
from colonnade.launcher.cluster.failures.position import Position
from colonnade.launcher.cluster.failures.report import FailureReporter, output_in_file
from colonnade.launcher.cluster.products import settle_products
from colonnade.launcher.cluster.ranks import (
    SINGLE_PROCESS,
    choose_device,
    end_with_launcher,
    prepare_rank,
    start_ranks,
)
from colonnade.launcher.cluster.rendezvous import connect
from colonnade.launcher.data import prepare_data
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import CHECKPOINTS, COMING, FAILURES, LOGS, SAVE
from colonnade.launcher.train.events import next_attempt
from colonnade.launcher.train.folder import NEWEST, OpenRun, ResumePoint, newest_step
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.run import Run
from colonnade.parallel.world import World, open_world

OpenFolder = Callable[[], AbstractContextManager[OpenRun]]  # opens and locks a run's folder


class Order(NamedTuple):
    """What a job is asked for.

    Attributes:
        source: where it goes on.
        until: after which step it stops; None: the last.
        step: at which the run is, as far as it is known before a checkpoint is read.
        restarts: how often ranks that are started on this host are started again after a failure.
    """

    source: ResumePoint = NEWEST
    until: int | None = None
    step: int = 0
    restarts: int = 0


def start(
    recipe: Recipe,
    environment: RankEnvironment | None,
    nproc: int,
    open_folder: OpenFolder,
    order: Order,
) -> Run:
    """Trains as a rank of a running job or as a single process, or starts ranks and waits for them.

    Args:
        recipe: a valid recipe.
        environment: the rank of this process; None if no launcher started it.
        nproc: ranks to start on this host, where no launcher started this process.
        open_folder: opens the run's folder, with the recipe in it.
        order: what the job is asked for.

    Raises:
        UserError: a mistake in the recipe or its data, or `nproc` > 1 under srun.
    """
    if environment is not None and environment.from_srun and nproc > 1:
        raise UserError(
            f"--nproc {nproc}: srun has started {environment.size} tasks, which are the ranks; "
            "leave --nproc out, and give srun one task per rank"
        )
    if environment is not None and order.restarts:
        raise UserError(
            f"--restarts {order.restarts}: the ranks were started by torchrun or srun, which alone "
            "can start them again: leave --restarts out, and give torchrun --max-restarts"
        )
    if environment is not None or (nproc == 1 and not order.restarts):
        return train_as_rank(recipe, environment or SINGLE_PROCESS, open_folder, order)
    # a fault that every rank would report is reported once, before ranks and a run's folder exist
    first_rank = RankEnvironment.on_one_host(0, nproc)
    device = choose_device(recipe.train.device, first_rank, recipe.train.compile)
    prepare_data(recipe, order.step)
    with open_folder() as run:
        checkpoints = run.path / CHECKPOINTS
        last_checkpoint = newest(checkpoints)
        print(f"starting    {nproc} ranks on {device.type}", flush=True)
        arguments = {
            "run": str(run.path),
            "resume": run.resume,
            "source": list(order.source),
            "until": order.until,
            "step": order.step,
            "parent": os.getpid(),
        }
        saves = recipe.checkpoint.usr1 == "save"
        on_usr1 = partial(ask_for_save, run.path) if saves else None
        try:
            status = start_ranks(
                train_started_rank, arguments, nproc, on_usr1, restarts=order.restarts
            )
        except SystemExit:
            if last := newest(checkpoints):
                again = f"colonnade train --resume {run.path} --nproc {nproc}"
                print(f"colonnade: go on from {last.name} with: {again}", file=sys.stderr)
            raise
        if status and newest(checkpoints) == last_checkpoint:
            print("colonnade: stopped before a new checkpoint was complete", file=sys.stderr)
    return Run(run.path, status)


def ask_for_save(run: Path) -> None:
    """Asks the ranks of a run for a checkpoint; they look for the file after every step."""
    try:
        (run / SAVE).touch()
    except OSError as error:  # an exception of a signal handler would end the job
        print(f"colonnade: cannot ask for a checkpoint: {error}", file=sys.stderr)


def train_as_rank(
    recipe: Recipe,
    environment: RankEnvironment,
    open_folder: OpenFolder,
    order: Order,
    started: bool = False,
) -> Run:
    """Trains as one rank. Rank 0 opens the run's folder, the first rank of each host prepares data.

    `started` says that our own launcher started this rank: the launcher has prepared the data, and
    announces signals to the user.
    """
    if not started and has_agent():
        end_with_launcher()
    device = prepare_rank(environment, recipe.train.device, recipe.train.compile)
    store, timeout = connect(environment, device), recipe.parallel.timeout
    with (
        ExitStack() as folders,
        open_world(environment.rank, environment.size, device, store, timeout) as world,
    ):
        settle_products(device)
        if world.is_rank_zero and not started and (advice := advice_on_restarts()):
            print(f"colonnade: {advice}", file=sys.stderr, flush=True)
        if not started:
            prepares = environment.local_rank == 0
            on_all_ranks(
                lambda: prepare_data(recipe, order.step) if prepares else None, world.wait_for_all
            )
        run = on_rank_zero(lambda: folders.enter_context(open_folder()))
        announce = environment.rank == 0 and not started
        reporter = open_reporter(run.path, world, started)
        with reporter.reporting(), own_output(run.path, reporter), reporter.watching():
            number = run_job(
                recipe, run.path, world, run.resume, order.until, announce, order.source, reporter
            )
    return Run(run.path, 128 + number if number else 0)


def open_reporter(run: Path, world: World, started: bool) -> FailureReporter:
    """Returns what reports failures of this attempt at a run. Collective: all-gathers the hosts."""
    attempt = on_rank_zero(lambda: next_attempt(run))
    hosts = on_all_ranks(socket.gethostname)
    return FailureReporter(run / FAILURES / f"attempt-{attempt}", world, Position(), hosts, started)


def own_output(run: Path, reporter: FailureReporter) -> AbstractContextManager[None]:
    """Returns a block in which ranks but the first print into files of their own."""
    rank = reporter.world.rank
    path = run / LOGS / reporter.folder.name / f"rank-{rank}.log"
    return output_in_file(path) if rank else nullcontext()


def open_again(opened: OpenRun) -> tuple[OpenRun, ResumePoint, int]:
    """Returns a run's folder that a failed attempt had opened, from where it goes on, and its step:
    from the newest checkpoint that is whole, if there is one."""
    coming = opened.resume and (opened.path / COMING).exists()  # no checkpoint was loaded yet
    has_checkpoint = newest(opened.path / CHECKPOINTS) is not None
    again = opened._replace(resume=has_checkpoint, adopted=not coming)
    return again, ResumePoint(None, automatic=True), newest_step(opened.path)


def train_started_rank(
    run: str, resume: bool, source: list[Any], until: int | None, step: int, parent: int
) -> None:
    """Trains as a rank that `start` started: the run's folder and the data are prepared."""
    if os.getppid() != parent:
        raise SystemExit(1)  # the launcher ended before this rank could ask to end with it
    opened, point = OpenRun(Path(run), resume), ResumePoint(*source)
    if restart_count():
        opened, point, step = open_again(opened)
    environment = RankEnvironment.from_environment() or SINGLE_PROCESS
    recipe = load_recipe(opened.recipe, world_size=environment.size, step=step)
    order = Order(point, until, step)
    train_as_rank(recipe, environment, lambda: nullcontext(opened), order, started=True)
