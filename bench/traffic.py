"""Bytes that ranks send under context parallelism: counted at the collectives, and by formula.

Both cover the forward and backward pass of one micro-batch. Neither includes the weights and
gradients that FSDP2 sends.
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

# A rank that passes n elements to a collective of n ranks sends so many elements.
SENT_OF_N = {
    "all_gather_into_tensor": lambda n: n * (n - 1),
    "reduce_scatter_tensor": lambda n: n - 1,
    "all_to_all_single": lambda n: n - 1,
}
SENDS_NOTHING = {"wait_tensor", "_wrap_tensor_autograd"}
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class SentBytesMode(TorchDispatchMode):
    """Adds up the bytes that this rank sends over gloo; FSDP2's operators are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "colonnade":
            # Our operators are opaque to dispatch: only inside them is it visible what they send.
            with self:
                return func.redispatch(CPU, *args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name == "send":
            self.bytes += sum(t.nbytes for t in args[0])
        elif func.namespace == "_c10d_functional" and name not in SENDS_NOTHING:
            ranks = group_by_name(args[-1]).size()
            self.bytes += args[0].nbytes * SENT_OF_N[name](ranks) // ranks
        return func(*args, **kwargs)


def random_batch(rows: int, tokens: int, vocab: int) -> Batch:
    """A batch of unpacked rows of random tokens and labels, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (2, rows, tokens), generator=generator, dtype=torch.int32)
    positions = torch.arange(tokens, dtype=torch.int32).expand(rows, tokens)
    return Batch(ids[0], ids[1], positions, torch.zeros_like(positions))


def counted(world: World, recipe: Recipe) -> int:
    """Runs a micro-batch forward and backward; returns the bytes that this rank sends."""
    _, model, _ = build_model(recipe, world)
    rows, tokens = recipe.train.micro_batch, recipe.train.seq_len
    batch = random_batch(rows, tokens, recipe.model.vocab)
    with SentBytesMode() as sent:
        loss, _ = forward(model, batch, list(range(rows)), world.device)
        loss.backward()
    return sent.bytes


def formula(recipe: Recipe, rank: int) -> int:
    """The bytes that a rank sends, by the cost model (`parallel.cost`)."""
    train = recipe.train
    element_size = {"fp64": 8, "bf16": 2}.get(train.precision, 4)
    traffic = Traffic(recipe.model, recipe.parallel, train.micro_batch, train.seq_len, element_size)
    return traffic.bytes_sent(rank)
