"""Describes a job at its start, for its output and its event, and prints a summary at its end."""

import socket
from pathlib import Path
from typing import Any

import torch

from colonnade.launcher.cluster.doctor import version
from colonnade.launcher.cluster.sizes import listed, size
from colonnade.launcher.data import Data
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import METRICS
from colonnade.launcher.train.events import STARTS, goodput, read_events
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.plot import plot_loads, plot_loss
from colonnade.models.shapes import measure
from colonnade.parallel.optimizer import OffloadedAdamW, Optimizer
from colonnade.parallel.optimizer.offload.report import slot_size
from colonnade.parallel.world import World


def describe_job(recipe: Recipe, world: World, data: Data, step: int, steps: int) -> str:
    """Describes the model, the ranks, the device and the data, for the start of the output; the run
    is at `step` of `steps`."""
    parameters = measure(recipe.model, recipe.train.seq_len).parameters
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    text = f"{recipe.name}: {parameters:,} parameters on {ranks}, {world.device.type}"
    unused = world.device.type == "cpu" and torch.cuda.is_available()
    if unused and recipe.train.device == "auto":
        count = torch.cuda.device_count()
        text += f" (this host has {count} GPUs, for jobs with at most one rank per GPU)"
    text += f"\n{describe_data(recipe, data)}"
    if step:
        text += f"\nresumed after step {step} of {steps}"
    return text


def describe_data(recipe: Recipe, data: Data) -> str:
    """Describes the rows to train and to validate on."""
    text = data.train.describe()
    if recipe.data.validation_sources and data.validation is not None:
        text += f"\nvalidation  {data.validation.describe()}"
    if recipe.data.held_out and recipe.train.validate_rows and data.validation is None:
        text += "\nno validation: the data have too few documents to hold rows out, or are streamed"
    return text


def describe_offload(optimizer: Optimizer, device: torch.device) -> str:
    """Describes where the optimizer's state is, and what it takes there of one rank; empty where it
    is on the device."""
    if not isinstance(optimizer, OffloadedAdamW):
        return ""
    settings, sizes = optimizer.settings, optimizer.host_sizes
    groups = f"{len(optimizer.groups)} groups"
    if settings.offload == "interleaved":
        placed = "as many as the first step shows to pay" if optimizer.refit else ""
        groups += f", {placed or sum(optimizer.placement)} updated on the device"
    text = f"offload     {settings.offload}: {groups}; kernel {optimizer.choice}"
    text += f"\n            host {size(sum(sizes.values()))} a rank ({listed(sizes)})"
    if slot := slot_size(optimizer):
        slots = "slots of at most" if optimizer.refit else "at most 2 slots of"
        text += f"; on the device {slots} {size(slot)}, margin {settings.margin:g} GiB"
    if device.type == "cpu":
        text += "; the device's memory is the host's own"
    return text


def start_facts(recipe: Recipe, world: World) -> dict[str, Any]:
    """What the event of a start records: the recipe's name, the layout, rank 0's host and device,
    and versions. `schedule` is that of a pipeline."""
    device = world.device
    gpu = device.type == "cuda"
    return {
        "recipe": recipe.name,
        "layout": recipe.parallel.layout(world.size),
        "schedule": recipe.parallel.schedule if recipe.parallel.pp > 1 else None,
        "ranks": world.size,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        "colonnade": version("colonnade"),
        "torch": str(torch.__version__),
    }


def print_summary(run: Path, steps: int, world: World, step: int) -> None:
    """Prints, on rank 0, the plots' paths, the run's folder, the goodput of a run that was started
    several times, and how to continue the run of so many `steps`."""
    try:
        for draw in (plot_loss, plot_loads):
            if plot := draw(run):
                print(f"plot        {plot}")
    except OSError as error:
        print(f"no plot     {error.filename or run}: {error.strerror}")
    print(f"run         {run}")
    events = read_events(run)
    if sum(event["event"] in STARTS for event in events) > 1:
        spent = goodput(events, read_metrics(run / METRICS, superseded=True))
        print(f"goodput     {spent.describe()}" if spent else "goodput     no time has passed")
    if step < steps:
        ranks = f" --nproc {world.size}" if world.size > 1 else ""
        print(
            f"stopped after step {step}, saved; go on with: colonnade train --resume {run}{ranks}"
        )
