"""Bytes that ranks send under context and expert parallelism: counted at the collectives, and by
formula.

Both cover the forward and backward pass of one micro-batch. Neither includes the weights and
gradients that FSDP2 sends.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_model
from colonnade.models.decoder import Decoder
from colonnade.parallel.collectives import OPAQUE, inside_opaque, sent_by
from colonnade.parallel.cost import Traffic
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.passes import forward
from colonnade.parallel.world import World


class SentBytesMode(TorchDispatchMode):
    """Counts the bytes that this rank sends, and its collectives, by operator and dtype.

    FSDP2's operators are not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, torch.dtype]] = Counter()
        self.calls: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPAQUE:
            return inside_opaque(self, func, args, kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" or name == "send":
            sent = sent_by(func, args)
            if sent is not None:
                self.count(name, sent.dtype, sent.bytes)
        return func(*args, **kwargs)

    def count(self, name: str, dtype: torch.dtype, sent: int) -> None:
        """Adds one collective, by which this rank sends so many bytes."""
        self.calls[name, dtype] += 1
        self.bytes[name, dtype] += sent


def random_batch(rows: int, tokens: int, vocab: int, seed: int = 0) -> Batch:
    """A batch of unpacked rows of random tokens and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (2, rows, tokens), generator=generator, dtype=torch.int32)
    positions = torch.arange(tokens, dtype=torch.int32).expand(rows, tokens)
    return Batch(ids[0], ids[1], positions, torch.zeros_like(positions))


def counted(world: World, recipe: Recipe) -> int:
    """Runs a micro-batch forward and backward; returns the bytes that this rank sends."""
    return sum(count(world, recipe).bytes.values())


def count(
    world: World, recipe: Recipe, prepare: Callable[[Decoder], object] = lambda model: None
) -> SentBytesMode:
    """Runs a micro-batch forward and backward; returns what this rank sends.

    Args:
        prepare: a function that changes the sharded model first.
    """
    mesh, model, _ = build_model(recipe, world)
    prepare(model)
    rows, tokens = recipe.train.micro_batch, recipe.train.seq_len
    index = data_rank(mesh)[0]
    batch, first = random_batch(rows, tokens, recipe.model.vocab, index), rows * index
    with SentBytesMode() as sent:
        loss, _ = forward(model, batch, list(range(first, first + rows)), world.device)
        loss.backward()
    return sent


def formula(recipe: Recipe, rank: int) -> int:
    """The bytes that a rank sends, by the cost model (`parallel.cost`)."""
    train = recipe.train
    element_size = {"fp64": 8, "bf16": 2}.get(train.precision, 4)
    traffic = Traffic(recipe.model, recipe.parallel, train.micro_batch, train.seq_len, element_size)
    return traffic.bytes_sent(rank)
