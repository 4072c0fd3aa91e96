"""A training job on one rank: what it consists of, and how that is built for a training stage."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.checkpoint import Saver
from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.cluster.host_kernels import settle_host_kernel
from colonnade.launcher.cluster.ranks import settle_determinism
from colonnade.launcher.cluster.startup import Startup
from colonnade.launcher.data import Data, open_data
from colonnade.launcher.data.prefetch import Prefetcher
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.stages import TrainingStage, training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import CHECKPOINTS
from colonnade.launcher.train.events import Events
from colonnade.launcher.train.guard.spikes import SpikeGuard
from colonnade.launcher.train.host_memory import require_host_memory
from colonnade.launcher.train.saves import lock_of, open_saver
from colonnade.launcher.train.timer import Timer
from colonnade.launcher.train.watch.watch import Watch
from colonnade.models.decoder import Decoder
from colonnade.parallel.engine import Engine, connect
from colonnade.parallel.lanes.pinned import PinnedMemoryError
from colonnade.parallel.materialise import draw_weights
from colonnade.parallel.mesh import build_expert_mesh, build_mesh
from colonnade.parallel.optimizer import Offload, Optimizer, build_optimizer
from colonnade.parallel.parallelize import COMPUTE, parallelize
from colonnade.parallel.pipeline.build import build_passes, local_stages, pipeline_stages
from colonnade.parallel.world import World


@dataclass
class Job:
    """The state of a training job on one rank."""

    stages: list[TrainingStage]  # of the run
    stage: TrainingStage  # that is trained
    run: Path
    world: World
    engine: Engine
    data: Data
    saver: Saver
    events: Events  # written by rank 0 alone
    lock: tuple[int, int] | None = None  # the file that this job has locked
    reader: Prefetcher | None = None
    step: int = 0  # completed steps
    bad_steps: int = 0  # consecutive non-finite steps up to now
    last_save: float = field(default_factory=time.monotonic)  # when the last save began
    timer: Timer = field(default_factory=Timer)
    watch: Watch = field(default_factory=Watch)
    guard: SpikeGuard = field(default_factory=SpikeGuard)
    startup: Startup | None = None  # until the first step has been trained
    # updates before a parameter's optimizer state began, which was frozen until then, by name
    before: dict[str, int] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe in force."""
        return self.stage.recipe

    @property
    def steps(self) -> int:
        """The steps of the whole run."""
        return self.stages[-1].stop

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks of the job, by axes."""
        return self.engine.mesh

    @property
    def model(self) -> Decoder:
        """The model, or this rank's stages of it."""
        return self.engine.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of this rank's shards."""
        return self.engine.optimizer

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.run / CHECKPOINTS


def build_engine(
    recipe: Recipe,
    world: World,
    prepare: Callable[[Decoder], object] | None = None,
    check: Callable[[Decoder], object] | None = None,
) -> Engine:
    """Builds the mesh, the sharded model or this rank's stages of it, with weights from the seed,
    the optimizer, and what runs their passes.

    Args:
        prepare: a function that changes the model before it is sharded and materialised.
        check: a function that refuses the sharded model before any memory is allocated for it.
    """
    mesh = build_mesh(recipe.parallel, world)
    stages = pipeline_stages(recipe.model, recipe.parallel, recipe.train.seq_len)
    with torch.device("meta"):
        local = local_stages(stages, recipe.parallel, mesh.get_local_rank("pp"))
        model = Decoder(recipe.model, recipe.train.loss_chunk, local)
    if prepare is not None:
        prepare(model)
    parallelize(model, mesh, recipe, build_expert_mesh(recipe.parallel, world))
    if check is not None:
        check(model)
    model.to_empty(device=world.device)
    optimizer = new_optimizer(model, recipe, world)
    draw_weights(model, recipe.train.seed, optimizer.masters())
    passes = build_passes(model, stages, mesh, recipe, world.device)
    connect(passes, optimizer)
    return Engine(model, optimizer, mesh, world.device, passes)


def new_optimizer(model: Decoder, recipe: Recipe, world: World) -> Optimizer:
    """Builds the optimizer of an allocated model. Collective.

    Raises:
        UserError: on all ranks, if memory of the host cannot be pinned on one and must be.
    """
    compute, offload = COMPUTE[recipe.train.precision], offload_of(recipe, world)
    built: list[Optimizer] = []

    def build_or_refuse() -> None:
        try:
            built.append(build_optimizer(model, recipe.optimizer, compute, offload))
        except PinnedMemoryError as error:
            raise UserError(str(error)) from error

    if offload is None:
        build_or_refuse()
    else:
        on_all_ranks(build_or_refuse)
    return built[0]


def offload_of(recipe: Recipe, world: World) -> Offload | None:
    """Returns kernel and device of offloaded optimizer state; None: it stays on the device.
    Collective: ranks agree on a kernel.

    Raises:
        UserError: the kernel that the recipe names is not available.
    """
    if recipe.optimizer.offload == "none":
        return None
    kernel, choice = settle_host_kernel(recipe.optimizer.host_kernel, world.wait_for_all)
    return Offload(kernel, world.device, not recipe.train.deterministic, choice=choice)


def build_model(
    recipe: Recipe, world: World, prepare: Callable[[Decoder], object] | None = None
) -> tuple[DeviceMesh, Decoder, Optimizer]:
    """Returns mesh, model and optimizer of `build_engine`."""
    engine = build_engine(recipe, world, prepare)
    return engine.mesh, engine.model, engine.optimizer


def checked_engine(recipe: Recipe, world: World) -> Engine:
    """Builds the engine of a job whose state its hosts have memory for."""
    check = partial(require_host_memory, recipe=recipe, world=world)
    return build_engine(recipe, world, check=check)


def build(
    recipe: Recipe,
    run: Path,
    world: World,
    events: Events | None = None,
    stage: TrainingStage | None = None,
) -> Job:
    """Builds the job of a recipe on this rank, at step 0, for its first training stage or another;
    without `events` it records none."""
    settle_determinism(recipe.train.deterministic)
    stages = training_stages(recipe)
    stage, events = stage or stages[0], events or Events()
    engine, data = checked_engine(stage.recipe, world), open_data(stage.recipe, stage.order)
    saver = open_saver(stages, run, events)
    return Job(stages, stage, run, world, engine, data, saver, events, lock_of(run))


def change_stage(job: Job, stage: TrainingStage) -> None:
    """Replaces engine and data of a job by those of another training stage, which need not have its
    layout; the old ones are freed first, so that there is memory for the new ones. Collective."""
    del job.engine, job.data, job.saver, job.reader  # the reader has the data
    gc.collect()
    job.stage, job.reader = stage, None
    job.engine = checked_engine(stage.recipe, job.world)
    job.data = open_data(stage.recipe, stage.order)
    job.saver = open_saver(job.stages, job.run, job.events)
