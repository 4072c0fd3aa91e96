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
from colonnade.models.config import ModelConfig
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.context.hops import group_of
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
            ranks = group_of(args[-1]).size()
            self.bytes += args[0].nbytes * SENDS[name](ranks) // ranks
        return func(*args, **kwargs)


def random_batch(rows: int, tokens: int, vocab: int) -> Batch:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(vocab, (2, rows, tokens), generator=generator, dtype=torch.int32)
    place = torch.arange(tokens, dtype=torch.int32).expand(rows, tokens)
    return Batch(both[0], both[1], place, torch.zeros_like(place))


def counted(here: World, recipe: Recipe) -> int:
    """What this rank sends."""
    _, model, _ = build_model(recipe, here)
    rows, tokens = recipe.train.micro_batch, recipe.train.seq_len
    batch = random_batch(rows, tokens, recipe.model.vocab)
    with Sent() as sent:
        loss, _ = forward(model, batch, list(range(rows)), here.device)
        loss.backward()
    return sent.bytes


def formula(recipe: Recipe, rank: int) -> int:
    """What a rank sends; no windows, and no convolutions in attention."""
    return sum(_of_sub_block(symbol, recipe, rank) for symbol in recipe.model.symbols)


def _of_sub_block(symbol: str, recipe: Recipe, rank: int) -> int:
    model, parallel, train = recipe.model, recipe.parallel, recipe.train
    number = 8 if train.precision == "fp64" else 2 if train.precision == "bf16" else 4
    wide = max(number, 4)
    rows, tokens = train.micro_batch, train.micro_batch * train.seq_len // parallel.cp
    if symbol == "*":
        return attention(model, parallel, tokens, number, wide)
    if symbol not in "MmDG":
        return 0
    halo = halos(parallel, rank) * rows * convolved(symbol, model) * number
    if parallel.recurrence == "states":
        return states(symbol, model, parallel, rows, wide) + halo
    return heads(symbol, model, parallel.cp, tokens, number, wide) + halo


def attention(
    model: ModelConfig, parallel: ParallelConfig, tokens: int, number: int, wide: int
) -> int:
    """Keys and values go round and their gradients come home, in `wide` bytes a number; or all are
    gathered, and gradients scattered. Before and after that, Ulysses' four exchanges: queries and
    outputs, keys and values, of which there are at least as many heads as ranks. `tokens` are a
    rank's.
    """
    exchanging = parallel.ulysses_degree(model.heads)
    others = parallel.cp // exchanging - 1
    width = model.head_dim or model.hidden // model.heads
    kv_heads = max(model.kv_heads or model.heads, exchanging)
    pairs = 2 * tokens * kv_heads * width
    home = others if parallel.context == "allgather" else others + 1
    round_trip = 2 * others * pairs * number + (home * pairs * wide if others else 0)
    given = 2 * tokens * (model.heads + kv_heads) * width * number
    return round_trip + 2 * given * (exchanging - 1) // exchanging


def states(symbol: str, model: ModelConfig, parallel: ParallelConfig, rows: int, wide: int) -> int:
    """What each segment leaves behind and what it keeps of the state before it, to all others."""
    H, P, N = mamba2(model)
    heads, _, key, value = delta(model)
    numbers = {
        "M": H * (P * N + 1),
        "m": 2 * mamba1(model) * model.mamba1_state,
        **dict.fromkeys("DG", heads * key * (value + key)),
    }[symbol]
    segments = 2 if parallel.zigzag else 1
    return 2 * (parallel.cp - 1) * segments * rows * numbers * wide


def heads(symbol: str, model: ModelConfig, ranks: int, tokens: int, number: int, wide: int) -> int:
    """What a scan takes and gives, for heads of all of the sequence; at least one for each rank."""
    H, P, N = mamba2(model)
    G = max(model.mamba_groups, ranks)
    count, keys, key, value = delta(model)
    C = mamba1(model)
    pairs = 2 * count * value + 2 * max(keys, ranks) * key
    token = {
        "M": (2 * H * P + 2 * G * N) * number + H * wide,
        # B and C, which all channels share, go to every rank, and their gradients come from there
        "m": 2 * C * number + C * wide + 2 * ranks * model.mamba1_state * number,
        "D": pairs * number + count * wide,
        "G": pairs * number + 2 * count * wide,
    }[symbol]
    return 2 * tokens * token * (ranks - 1) // ranks


def halos(parallel: ParallelConfig, rank: int) -> int:
    """Segments whose last rows go to another rank, and those whose rows' gradients do."""
    neighbours = (rank > 0) + (rank < parallel.cp - 1)
    return neighbours * (2 if parallel.zigzag else 1)


def convolved(symbol: str, model: ModelConfig) -> int:
    """Numbers that a convolution reads of the tokens before a segment."""
    H, P, N = mamba2(model)
    count, keys, key, value = delta(model)
    return {
        "M": (model.mamba_conv - 1) * (H * P + 2 * model.mamba_groups * N),
        "m": (model.mamba1_conv - 1) * mamba1(model),
        **dict.fromkeys("DG", (model.delta_conv - 1) * (2 * keys * key + count * value)),
    }[symbol]


def mamba1(model: ModelConfig) -> int:
    """Channels."""
    return model.mamba1_inner or 2 * model.hidden


def mamba2(model: ModelConfig) -> tuple[int, int, int]:
    """Heads, their width, width of a state."""
    width = model.mamba_head_dim
    return model.mamba_heads or 2 * model.hidden // width, width, model.mamba_state


def delta(model: ModelConfig) -> tuple[int, int, int, int]:
    """Heads, key heads, width of a key and of a value."""
    key = model.delta_key_dim
    heads = model.delta_heads or model.hidden // key
    return heads, model.delta_key_heads or heads, key, model.delta_value_dim or key
