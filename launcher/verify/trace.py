"""A few training steps of a recipe, and everything that they leave behind."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from colonnade.kernels.loss import IGNORED
from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_model
from colonnade.launcher.train.schedule import micro_batches
from colonnade.launcher.train.step import train_step
from colonnade.models.decoder import Decoder
from colonnade.models.parameters import Fill
from colonnade.models.part import Part
from colonnade.parallel.engine import Engine
from colonnade.parallel.gradients import clip_gradients
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.world import World

KINDS = {"losses": "losses", "norms": "gradient norms", "gradients": "gradients",
         "parameters": "parameters"}  # fmt: skip
NOISE = 0.05  # standard deviation of what is added to all initial weights
UNLABELLED = 0.3  # share of the tokens that have no loss


@dataclass
class Trace:
    """What a few steps left behind, whole tensors on the CPU by name; steps count from 1.

    Attributes:
        losses: every part of the objective at every step.
        norms: the norm of all gradients at every step.
        gradients: every gradient at every step, complete over ranks, before clipping.
        parameters: every parameter and buffer after every step.
        apart: how far ranks that hold the same part of any of these are from each other, if at all.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)


class Piece(NamedTuple):
    """The part of a tensor that a rank holds."""

    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    values: Tensor


def traced(
    recipe: Recipe,
    here: World,
    starts: Mapping[str, Tensor] | None = None,
    change: Callable[[Decoder, int], object] | None = None,
) -> Trace:
    """Train all steps of a recipe on random rows. Collective over all ranks.

    Args:
        recipe: what to train, at test size.
        here: this rank.
        starts: another trace's `parameters`, on every rank: each step but the first starts from
            what that one's step before left, so that no step amplifies the rounding of another. By
            default it starts from what this one's left.
        change: gets the model and the number of steps done before every step.

    Returns:
        the trace on rank 0; on the others no more than the losses and norms that they found.
    """
    mesh, model, optimizer = build_model(recipe, here, perturb)
    pieces: dict[str, Piece] = {}
    step = 0

    def keep(group: str, name: str, value: Tensor) -> None:
        pieces[f"{group}/{name}"] = piece(value)

    def keep_gradients() -> None:
        for name, p in model.named_parameters():
            if p.grad is not None:
                keep("gradients", f"step {step + 1}: {name}", p.grad)

    optimizer.observers.append(keep_gradients)
    engine = Engine(model, optimizer, mesh, here.device)
    for step in range(recipe.train.steps):
        if step and starts is not None:
            set_weights(model, {n: starts[f"after step {step}: {n}"] for n, _ in held(model)})
        if change is not None:
            change(model, step)
        mine = micro_batches(recipe.train, step, *data_rank(mesh))
        vocab, length = recipe.model.vocab, recipe.train.seq_len
        batches = [random_rows(samples, vocab, length) for samples in mine]
        found = train_step(engine, batches, mine, recipe, step).report
        scale = clipping(found.grad_norm, recipe.optimizer.clip)
        for key in pieces:
            if key.startswith(f"gradients/step {step + 1}: "):
                pieces[key].values.div_(scale)
        figures = {"loss": found.loss, "balance": found.balance, **found.extras}
        for name, value in figures.items():
            keep("losses", f"step {step + 1}: {name}", torch.tensor(value, dtype=torch.float64))
        keep("norms", f"step {step + 1}", torch.tensor(found.grad_norm, dtype=torch.float64))
        for name, tensor in held(model):
            keep("parameters", f"after step {step + 1}: {name}", tensor)
    return gathered(pieces, here)


def held(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by its name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def set_weights(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Copy this rank's shard of whole tensors, by name, into every parameter and buffer."""
    for name, tensor in held(model):
        local, offset = shard_of(tensor)
        local.copy_(weights[name][slices(offset, local.shape)])


def clipping(norm: float, limit: float) -> float:
    """What clipping multiplies all gradients by: undone, one that is wrong is wrong alone."""
    probe = nn.Parameter(torch.ones((), dtype=torch.float64))
    probe.grad = torch.ones_like(probe)
    if limit:
        clip_gradients([probe], torch.tensor(norm, dtype=torch.float64), limit)
    return float(probe.grad)


def perturb(model: Decoder) -> None:
    """Add N(0, NOISE²) to all initial weights: a zero or a one hides what is done to it."""

    def noisy(fill: Fill) -> Fill:
        def fill_and_add(t: Tensor, g: Generator) -> None:
            fill(t, g)
            t.add_(torch.randn(t.shape, generator=g, dtype=t.dtype), alpha=NOISE)

        return fill_and_add

    for part in model.modules():
        if isinstance(part, Part):
            for name, _ in part.named_parameters(recurse=False):
                spec = part.specs[name]
                spec.fill = noisy(spec.fill)


def random_rows(samples: Iterable[int], vocab: int, length: int) -> Batch:
    """Rows of two documents with tokens without loss, each a function of its sample's index."""
    rows = []
    place = torch.arange(length, dtype=torch.int32)
    for sample in samples:
        g = Generator().manual_seed(sample)
        tokens, labels = torch.randint(0, vocab, (2, length), generator=g, dtype=torch.int32)
        labels[torch.rand(length, generator=g) < UNLABELLED] = IGNORED
        second = int(torch.randint(1, length, (), generator=g))
        later = (place >= second).int()
        rows.append((tokens, labels, place - later * second, later))
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def shard_of(t: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What a rank holds of a tensor, and where that starts in the whole."""
    if not isinstance(t, DTensor):
        return t.detach(), (0,) * t.dim()
    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return t.to_local().detach(), tuple(offset)


def slices(offset: Iterable[int], shape: Iterable[int]) -> tuple[slice, ...]:
    """The place in the whole of a shard of this shape that starts at `offset`."""
    ends = zip(offset, shape, strict=True)
    return tuple(slice(start, start + size) for start, size in ends)


def piece(t: Tensor) -> Piece:
    """This rank's part of a tensor, kept for later."""
    local, offset = shard_of(t)
    return Piece(tuple(t.shape), offset, local.cpu().clone())


def gathered(pieces: dict[str, Piece], here: World) -> Trace:
    """The pieces of all ranks, put together on rank 0. Collective."""
    boxes: list[dict[str, Piece]] | None = [{}] * here.size if here.first else None
    dist.gather_object(pieces, boxes, dst=0)
    own = {key: piece for key, piece in pieces.items() if key.startswith(("losses/", "norms/"))}
    trace = Trace()
    for key in {key: None for box in boxes or [own] for key in box}:
        group, _, name = key.partition("/")
        tensor, apart = assembled([box.get(key) for box in boxes or [own]])
        getattr(trace, group)[name] = tensor
        if apart:
            trace.apart[name] = apart
    return trace


def assembled(pieces: list[Piece | None]) -> tuple[Tensor, float]:
    """A tensor of its pieces, NaN where no rank has it, and how far overlapping ones are apart.

    Infinitely, where a rank has none.
    """
    present = [p for p in pieces if p is not None]
    whole = torch.full(present[0].shape, math.nan, dtype=present[0].values.dtype)
    apart = 0.0 if len(present) == len(pieces) else math.inf
    for _, offset, values in present:
        if not values.numel():
            continue
        place = whole[slices(offset, values.shape)]
        seen = ~place.isnan()
        if seen.any():
            far = (place - values)[seen].abs().nan_to_num(math.inf, math.inf)
            apart = max(apart, float(far.max()))
        place.copy_(torch.where(seen, place, values))
    return whole, apart
