"""A row of sub-blocks with its wiring, which ladder's benchmarks time on one of two ranks.

Forward takes random activations, backward a random gradient of the output. Embedding, head, loss
and optimizer are left out.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import skips_newest
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.materialise import materialise
from colonnade.parallel.parallelize import parallelize

PATTERNS = {"*-": "attention-MLP", "M-": "Mamba-MLP"}
VARIANTS = ("none", "standard", "ladder")  # no communication; `model.residual` with communication
RANKS = 2
# The share of a standard step that communication is to take: the middle of 25 to 40%.
COMMUNICATION_SHARE = 0.32

Seams = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # enter, leave


@dataclass(frozen=True)
class Shape:
    """Sizes of the row that is timed."""

    repeat: int = 8  # how often the row repeats a pattern of two sub-blocks
    hidden: int = 2048
    seq: int = 512
    batch: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def blocks(self) -> int:
        """The number of sub-blocks in the row."""
        return 2 * self.repeat

    def model(self, pattern: str) -> ModelConfig:
        """The config of a row whose heads, groups and widths the number of ranks divides.

        Attention has half as many FLOPs as its MLP, as is usual. The inner width of every sub-block
        is twice the usual one: where the cores that compute also do the link's work, that work,
        which depends on `hidden` alone, should weigh as little as on a real network.
        """
        D = self.hidden
        return ModelConfig(
            pattern=pattern,
            repeat=self.repeat,
            hidden=D,
            heads=2 * D // 64,
            head_dim=64,
            ffn=16 * D // 3 // 64 * 64,
            mamba_heads=4 * D // 64,
            mamba_groups=RANKS,
            mamba_state=64,
            vocab=64,
        )

    def __str__(self) -> str:
        return (
            f"{self.blocks} sub-blocks, hidden {self.hidden}, sequence {self.seq}, batch "
            f"{self.batch}, {str(self.dtype).removeprefix('torch.')}, tp {RANKS}; without "
            "embedding, head, loss and optimizer"
        )


class Row:
    """One rank's shard of a row of sub-blocks, with random weights, input and output gradient.

    `model` is sharded and on meta.
    """

    def __init__(self, model: Decoder, shape: Shape, device: torch.device) -> None:
        materialise(model, device, seed=0)
        self.wiring = model.wiring.to(shape.dtype)
        config = model.config
        ladder = config.model_copy(update={"residual": "ladder"})
        self.skips_newest = {
            "standard": skips_newest(config, config.symbols),
            "ladder": skips_newest(ladder, config.symbols),
        }
        positions = torch.arange(shape.seq, device=device)[:, None]
        self.context = Context(positions.expand(shape.seq, shape.batch))
        generator = torch.Generator().manual_seed(0)
        # Drawn as one tensor, [2, S, B, D]: the input, and the gradient of the output.
        tensors = torch.randn(2, shape.seq, shape.batch, shape.hidden, generator=generator)
        self.stream, self.output_grad = tensors.to(device, shape.dtype).unbind()

    def rewire(self, residual: str, seams: Any = None) -> None:
        """Wires the row as `model.residual = residual`, and clears all gradients.

        `seams` replace those that communicate; None: they communicate.
        """
        self.wiring.skips_newest = self.skips_newest[residual]
        self.wiring.zero_grad()

    def forward(self) -> Tensor:
        """Returns the residual stream after the last sub-block."""
        return self.wiring(self.stream.clone().requires_grad_(), self.context)[0]

    def backward(self, output: Tensor) -> None:
        """Computes the gradients of all parameters and of the input."""
        output.backward(self.output_grad)


class TensorRow(Row):
    """A row under tensor parallelism, whose seams `enter` and `leave` communicate."""

    def __init__(
        self, shape: Shape, pattern: str, sequence: bool, mesh: DeviceMesh, device: torch.device
    ) -> None:
        config = shape.model(pattern)
        recipe = Recipe(
            model=config,
            parallel=ParallelConfig(tp=RANKS, sequence=sequence),
            train=TrainConfig(seq_len=shape.seq),
        )
        with torch.device("meta"):
            model = Decoder(config)
        super().__init__(parallelize(model, mesh, recipe), shape, device)
        self.seams: Seams = self.wiring.enter, self.wiring.leave
        if sequence:
            rank = mesh.get_local_rank("tp")
            self.stream = self.stream.chunk(RANKS)[rank]
            self.output_grad = self.output_grad.chunk(RANKS)[rank]

    def rewire(self, residual: str, seams: Seams | None = None) -> None:
        super().rewire(residual)
        self.wiring.enter, self.wiring.leave = seams or self.seams


def overlap_figures(seconds: dict[str, list[float]], blocks: int) -> dict[str, float]:
    """The share of communication that ladder hides in one direction, forward or backward.

    Communication at the ends of the row stays exposed: in each direction one of its `blocks`
    sub-blocks has no neighbour whose computation could hide its communication.

    Args:
        seconds: of each variant in this direction, by round.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    exposed = medians["standard"] - medians["none"]
    return {
        **{f"{name} ms": 1000 * medians[name] for name in VARIANTS},
        "hidden": (medians["standard"] - medians["ladder"]) / exposed,
        "bound by the ends": 1 - 1 / blocks,
    }


def step_figures(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the ratios between the variants' step times, given in seconds by round."""
    rounds = list(zip(*(seconds[name] for name in VARIANTS), strict=True))
    communication = [(standard - none) / standard for none, standard, _ in rounds]
    speedup = [standard / ladder for _, standard, ladder in rounds]
    without_communication = [none / ladder for none, _, ladder in rounds]
    return {
        "communication / standard step": statistics.median(communication),
        "step, standard / ladder": statistics.median(speedup),
        "step, without communication / ladder": statistics.median(without_communication),
    }
