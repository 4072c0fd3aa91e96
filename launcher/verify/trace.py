"""Trains a few steps of a recipe, and records losses, gradients and parameters."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from colonnade.kernels.labels import IGNORED
from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_engine
from colonnade.launcher.train.schedule import micro_batches, trained_micro_batches
from colonnade.launcher.train.step import train_step
from colonnade.models.decoder import Decoder
from colonnade.models.names import canonical
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import Fill
from colonnade.parallel.engine import Engine
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.world import World

KINDS = {"losses": "losses", "norms": "gradient norms", "gradients": "gradients",
         "parameters": "parameters"}  # fmt: skip
NOISE = 0.05  # standard deviation of the noise that is added to all initial weights
UNLABELLED = 0.3  # fraction of the tokens that have no loss


@dataclass
class Trace:
    """The record of a few training steps: global tensors on the CPU, by name; steps count from 1.

    Attributes:
        losses: every term of the objective at every step.
        norms: the norm of all gradients at every step.
        gradients: every gradient at every step, reduced over ranks, before clipping.
        parameters: every parameter and buffer after every step.
        replica_differences: for any of these by name, the largest difference between ranks that
            hold the same elements, where it is not 0.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    replica_differences: dict[str, float] = field(default_factory=dict)


class Shard(NamedTuple):
    """A rank's shard of a tensor.

    Attributes:
        shape: of the global tensor.
        offset: index in the global tensor of the shard's first element.
        values: the shard, on the CPU.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor


def record_trace(
    recipe: Recipe,
    world: World,
    starts: Mapping[str, Tensor] | None = None,
    change: Callable[[Decoder, int], object] | None = None,
) -> Trace:
    """Trains all steps of a recipe on random rows; gathers the record on rank 0. Collective.

    Args:
        recipe: what to train, at test size.
        world: this rank among all ranks.
        starts: the `parameters` of another trace, on every rank. Each step but the first then
            starts from the other trace's parameters after the step before, so that no step
            amplifies the rounding of another. None: each step starts from the result of the step
            before.
        change: is called before every step with the model and the number of steps done.

    Returns:
        the trace, on rank 0; on other ranks a trace of their losses and norms only.
    """
    engine = build_engine(recipe, world, perturb_initial_weights)
    mesh, model, optimizer = engine.mesh, engine.model, engine.optimizer
    shards: dict[str, Shard] = {}
    (stage,), step = training_stages(recipe), 0

    def record(kind: str, name: str, value: Tensor) -> None:
        shards[f"{kind}/{name}"] = copy_shard(value)

    def record_gradients() -> None:
        for name, p in model.named_parameters():
            if (gradient := optimizer.gradient(p)) is not None:
                record("gradients", f"step {step + 1}: {name}", gradient)

    # called within the update, when gradients are reduced, and not clipped yet: with clipping, a
    # fault in one gradient would change all others
    optimizer.step_pre_hooks.append(record_gradients)
    for step in range(recipe.train.steps):
        if step and starts is not None:
            names = [name for name, _ in named_state(model)]
            set_weights(engine, {name: starts[f"after step {step}: {name}"] for name in names})
        if change is not None:
            change(model, step)
        samples = micro_batches(stage, step, *data_rank(mesh))
        vocab, length = recipe.model.vocab, recipe.train.seq_len
        batches = [random_rows(of_batch, vocab, length) for of_batch in samples]
        trained = trained_micro_batches(stage, step, *data_rank(mesh))
        report = train_step(engine, batches, samples, stage, step, trained=trained).report
        losses = {"loss": report.loss, "balance": report.balance, **report.extras}
        for name, value in losses.items():
            record("losses", f"step {step + 1}: {name}", torch.tensor(value, dtype=torch.float64))
        record("norms", f"step {step + 1}", torch.tensor(report.grad_norm, dtype=torch.float64))
        for name, tensor in named_state(model):
            record("parameters", f"after step {step + 1}: {name}", tensor)
    return gather_trace(shards, {name for name, _ in named_state(model)}, world)


def named_state(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, with their names."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def set_weights(engine: Engine, weights: Mapping[str, Tensor]) -> None:
    """Copies this rank's shard of global tensors, by name, into every parameter and buffer, or into
    the master weights of the optimizer."""
    masters = engine.optimizer.masters()
    for name, tensor in named_state(engine.model):
        local, offset = shard_of(masters.get(canonical(name), tensor))
        local.copy_(weights[name][slices(offset, local.shape)])
    engine.optimizer.write_weights()


def perturb_initial_weights(model: Decoder) -> None:
    """Adds N(0, NOISE²) to the initial distribution of all weights.

    A weight that is zero or one would hide errors in the operations on it.
    """

    def noisy(fill: Fill) -> Fill:
        def fill_and_add(t: Tensor, g: Generator) -> None:
            fill(t, g)
            t.add_(torch.randn(t.shape, generator=g, dtype=t.dtype), alpha=NOISE)

        return fill_and_add

    for part in model.modules():
        if isinstance(part, ParameterModule):
            for name, _ in part.named_parameters(recurse=False):
                spec = part.specs[name]
                spec.fill = noisy(spec.fill)


def random_rows(samples: Iterable[int], vocab: int, length: int) -> Batch:
    """Random rows of two documents, in which some tokens have no loss.

    Each row depends only on the index of its sample, so that it is the same on every layout.

    Returns:
        tokens, labels, positions in the document and document indices, `[rows, length]` in int32.
    """
    rows = []
    position = torch.arange(length, dtype=torch.int32)
    for sample in samples:
        g = Generator().manual_seed(sample)
        tokens, labels = torch.randint(0, vocab, (2, length), generator=g, dtype=torch.int32)
        labels[torch.rand(length, generator=g) < UNLABELLED] = IGNORED
        second_start = int(torch.randint(1, length, (), generator=g))
        document = (position >= second_start).int()
        rows.append((tokens, labels, position - document * second_start, document))
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def shard_of(t: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's shard of a tensor, and the index of its first element in the global tensor."""
    if not isinstance(t, DTensor):
        return t.detach(), (0,) * t.dim()
    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return t.to_local().detach(), tuple(offset)


def slices(offset: Iterable[int], shape: Iterable[int]) -> tuple[slice, ...]:
    """The slices of a global tensor at which a shard of this shape and offset lies."""
    ends = zip(offset, shape, strict=True)
    return tuple(slice(start, start + size) for start, size in ends)


def copy_shard(t: Tensor) -> Shard:
    """A copy on the CPU of this rank's shard of a tensor."""
    local, offset = shard_of(t)
    return Shard(tuple(t.shape), offset, local.cpu().clone())


def gather_trace(shards: dict[str, Shard], held: set[str], world: World) -> Trace:
    """Gathers the shards of all ranks on rank 0, and assembles them to a trace there.

    `held` are the names of this rank's parameters and buffers: of a pipeline, its stages'. Other
    ranks return a trace of their losses and norms.
    """
    empty: list[tuple[dict[str, Shard], set[str]]] = [({}, set())] * world.size
    by_rank = empty if world.is_rank_zero else None
    dist.gather_object((shards, held), by_rank, dst=0)
    if by_rank is None:
        own = {k: s for k, s in shards.items() if k.startswith(("losses/", "norms/"))}
        by_rank = [(own, held)]
    trace = Trace()
    keys = {key: None for of_rank, _ in by_rank for key in of_rank}  # in order, each once
    for key in keys:
        kind, _, name = key.partition("/")
        tensor_name = name.partition(": ")[2]
        owners = [
            of_rank.get(key)
            for of_rank, names in by_rank
            if kind in ("losses", "norms") or tensor_name in names
        ]
        tensor, difference = assemble(owners)
        getattr(trace, kind)[name] = tensor
        if difference:
            trace.replica_differences[name] = difference
    return trace


def assemble(shards: list[Shard | None]) -> tuple[Tensor, float]:
    """Assembles a global tensor of the shards of all ranks that should have one.

    Returns:
        the tensor, NaN in elements that no rank has; and the largest difference between shards in
        elements that several ranks have, infinite where a rank has no shard (None).
    """
    present = [shard for shard in shards if shard is not None]
    tensor = torch.full(present[0].shape, math.nan, dtype=present[0].values.dtype)
    difference = 0.0 if len(present) == len(shards) else math.inf
    for _, offset, values in present:
        if not values.numel():
            continue
        target = tensor[slices(offset, values.shape)]
        seen = ~target.isnan()
        if seen.any():
            differences = (target - values)[seen].abs().nan_to_num(math.inf, math.inf)
            difference = max(difference, float(differences.max()))
        target.copy_(torch.where(seen, target, values))  # the lowest rank's value stays
    return tensor, difference
