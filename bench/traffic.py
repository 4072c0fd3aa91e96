"""Bytes that ranks which share a sequence send each other: counted as they leave, and by formula.

Both are of the forward and backward pass of one micro-batch. What FSDP2 sends, weights and their
gradients, is in neither.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_model
from colonnade.parallel.context.p2p import group_by_name
from colonnade.parallel.cost import Traffic
from colonnade.parallel.engine import forward
from colonnade.parallel.world import World

# How many nths of what one of n ranks hands to a collective it has to send.
SENDS = {
    "all_gather_into_tensor": lambda n: n * (n - 1),
    "reduce_scatter_tensor": lambda n: n - 1,
    "all_to_all_single": lambda n: n - 1,
}
SILENT = {"wait_tensor", "_wrap_tensor_autograd"}
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Sent(TorchDispatchMode):
    """Adds up the bytes that this rank sends, for gloo; FSDP2's operators are other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "colonnade":  # what our own operators send is seen inside them alone
            with self:
                return func.redispatch(CPU, *args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name == "send":
            self.bytes += sum(t.nbytes for t in args[0])
        elif func.namespace == "_c10d_functional" and name not in SILENT:
            ranks = group_by_name(args[-1]).size()
            self.bytes += args[0].nbytes * SENDS[name](ranks) // ranks
        return func(*args, **kwargs)


def random_batch(rows: int, tokens: int, vocab: int) -> Batch:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(vocab, (2, rows, tokens), generator=generator, dtype=torch.int32)
    place = torch.arange(tokens, dtype=torch.int32).expand(rows, tokens)
    return Batch(both[0], both[1], place, torch.zeros_like(place))


def counted(world: World, recipe: Recipe) -> int:
    """What this rank sends."""
    _, model, _ = build_model(recipe, world)
    rows, tokens = recipe.train.micro_batch, recipe.train.seq_len
    batch = random_batch(rows, tokens, recipe.model.vocab)
    with Sent() as sent:
        loss, _ = forward(model, batch, list(range(rows)), world.device)
        loss.backward()
    return sent.bytes


def formula(recipe: Recipe, rank: int) -> int:
    """What a rank sends, as `parallel.cost` has it."""
    train = recipe.train
    number = 8 if train.precision == "fp64" else 2 if train.precision == "bf16" else 4
    traffic = Traffic(recipe.model, recipe.parallel, train.micro_batch, train.seq_len, number)
    return traffic.bytes_sent(rank)
