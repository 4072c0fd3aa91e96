"""Initial weights from (seed, name, global block): bit-equal on every layout."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.names import canonical
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import Fill
from colonnade.parallel.gradients import local

BLOCK = 1 << 16  # about how many elements of a parameter one generator draws


def tensors_to_fill(model: nn.Module) -> Iterator[tuple[str, Tensor, Fill]]:
    """Yields every parameter and buffer with its canonical name and its initial distribution."""
    for prefix, module in model.named_modules():
        buffers = module.named_buffers(recurse=False)
        for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
            assert isinstance(module, ParameterModule), f"{prefix}.{name} has no record"
            yield canonical(f"{prefix}.{name}"), tensor, module.specs[name].fill


def new_decoder(
    config: ModelConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A decoder on one device with the initial weights of a run with this seed."""
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    materialise(model, torch.device(device), seed)
    return model


def load_decoder(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Decoder:
    """A decoder on one device with copies of these weights.

    Args:
        config: of the model.
        tensors: our tensors by name, as `read_hf` and `state_dict` return them.
        device: of the decoder.
        dtype: of its parameters; None: that of `tensors`. Buffers keep theirs.

    Raises:
        RuntimeError: tensors are missing, unexpected or of another shape; the message names them.
    """
    with torch.device("meta"):
        model = Decoder(config)
    parameters = {name for name, _ in model.named_parameters()}
    copies = {
        name: tensor.detach().to(
            device,
            dtype if dtype is not None and name in parameters else tensor.dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for name, tensor in tensors.items()
    }
    model.load_state_dict(copies, assign=True)
    return model


def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Allocates a model that was built on meta and sharded on `device`, and fills its tensors."""
    model.to_empty(device=device)
    draw_weights(model, seed)


@torch.no_grad()
def draw_weights(
    model: nn.Module, seed: int, masters: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Fills the tensors of an allocated model from (seed, name, global block).

    Every rank fills its own shards, without communication. Where there are `masters` of weights,
    by name, these are filled, and the weights are their rounded values.
    """
    for name, tensor, fill in tensors_to_fill(model):
        drawn = masters.get(name, tensor)
        if isinstance(drawn, DTensor):
            _, offset = compute_local_shape_and_global_offset(
                drawn.shape, drawn.device_mesh, drawn.placements
            )
        else:
            offset = (0,) * drawn.dim()
        fill_shard(local(drawn), drawn.shape, offset, fill, f"{seed}/{name}")
        if drawn is not tensor:
            local(tensor).copy_(local(drawn))


def fill_shard(
    shard: Tensor, shape: tuple[int, ...], offset: tuple[int, ...], fill: Fill, key: str
) -> None:
    """Fills the shard of a parameter of this global `shape` that starts at `offset`.

    The parameter, seen as `[rows, columns]` with the last dimension as columns, is divided into
    blocks of full rows. Each block is drawn by its own generator, keyed by (key, block), in fp32 on
    the CPU. A shard draws every block that it overlaps.
    """
    if shard.numel() == 0:
        return
    columns = shape[-1]
    per_block = max(1, BLOCK // columns)
    rows = global_rows(shape[:-1], shard.shape[:-1], offset[:-1])
    target = shard.view(len(rows), shard.shape[-1])
    local_columns = slice(offset[-1], offset[-1] + shard.shape[-1])
    total = math.prod(shape[:-1])
    block_of = rows // per_block
    for block in block_of.unique().tolist():
        first = block * per_block
        drawn = torch.empty(min(per_block, total - first), columns, dtype=torch.float32)
        digest = hashlib.blake2b(f"{key}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        fill(drawn, generator)
        in_block = block_of == block
        target[in_block.to(target.device)] = drawn[rows[in_block] - first, local_columns].to(target)


def global_rows(shape: tuple[int, ...], local: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """The global row number of every local row, where leading dimensions are flattened."""
    rows = torch.zeros(1, dtype=torch.long)
    for size, local_size, start in zip(shape, local, offset, strict=True):
        rows = (rows[:, None] * size + torch.arange(start, start + local_size)).flatten()
    return rows
