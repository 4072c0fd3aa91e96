"""Starts the ranks of a training job on this host, or takes part in it as one of them.

This file imports little: only ranks import what trains (`train.rank`), which takes seconds.
"""

import os
import sys
from functools import partial
from pathlib import Path

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import SINGLE_PROCESS, choose_device, start_ranks
from colonnade.launcher.cluster.secrets import masked
from colonnade.launcher.cluster.startup import process_start
from colonnade.launcher.data import prepare_data
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import SAVE
from colonnade.launcher.train.folder import newest_step
from colonnade.launcher.train.order import OpenFolder, Order
from colonnade.launcher.train.run import Run

RANK = "colonnade.launcher.train.rank:train_started_rank"  # what a rank that is started calls


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
        from colonnade.launcher.train.rank import train_as_rank

        return train_as_rank(recipe, environment or SINGLE_PROCESS, open_folder, order)
    # a fault that every rank would report is reported once, before ranks and a run's folder exist
    first_rank = RankEnvironment.on_one_host(0, nproc)
    device = choose_device(recipe.train.device, first_rank, recipe.train.compile)
    prepare_data(recipe, order.step)
    with open_folder() as run:
        last_checkpoint = newest_step(run.path)
        print(f"starting    {nproc} ranks on {device.type}", flush=True)
        arguments = {
            "run": str(run.path),
            "resume": run.resume,
            "source": list(order.source),
            "until": order.until,
            "step": order.step,
            "command": masked(order.command or sys.argv),
            "launched": process_start(),
            "parent": os.getpid(),
        }
        saves = recipe.checkpoint.usr1 == "save"
        on_usr1 = partial(ask_for_save, run.path) if saves else None
        try:
            status = start_ranks(RANK, arguments, nproc, on_usr1, order.restarts)
        except SystemExit:
            if last := newest_step(run.path):
                again = f"colonnade train --resume {run.path} --nproc {nproc}"
                print(f"colonnade: go on from step {last} with: {again}", file=sys.stderr)
            raise
        if status and newest_step(run.path) == last_checkpoint:
            print("colonnade: stopped before a new checkpoint was complete", file=sys.stderr)
    return Run(run.path, status)


def ask_for_save(run: Path) -> None:
    """Asks the ranks of a run for a checkpoint; they look for the file after every step."""
    try:
        (run / SAVE).touch()
    except OSError as error:  # an exception of a signal handler would end the job
        print(f"colonnade: cannot ask for a checkpoint: {error}", file=sys.stderr)
