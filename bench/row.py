"""The wiring of a model alone under tensor parallelism, as ladder's benchmarks time it.

Random activations go in and a random gradient comes back to its output: embedding, head, loss and
optimizer stand outside.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

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
VARIANTS = ("none", "standard", "ladder")  # without communication; and how the stream is wired
RANKS = 2
SHARE = 0.32  # of the standard step is to be communication: the middle of 25 to 40%

Seams = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # enter, leave


@dataclass(frozen=True)
class Shape:
    """Sizes of what is timed."""

    repeat: int = 8  # of a pattern of two sub-blocks
    hidden: int = 2048
    seq: int = 512
    batch: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def blocks(self) -> int:
        """Sub-blocks in the row."""
        return 2 * self.repeat

    def model(self, pattern: str) -> ModelConfig:
        """A row whose heads, groups and widths divide by the ranks.

        Attention has half of its MLP's work, as is usual. All are twice as wide inside as is usual:
        where the cores that compute do the link's work too, that work, which goes by `hidden`
        alone, should weigh as little as on a real network.
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
    """One rank's share of a row of sub-blocks."""

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
        parallelize(model, mesh, recipe)
        materialise(model, device, seed=0)
        self.wiring = wiring = model.wiring.to(shape.dtype)
        self.seams: Seams = wiring.enter, wiring.leave
        ladder = config.model_copy(update={"residual": "ladder"})
        self.skips_newest = {
            "standard": skips_newest(config, config.symbols),
            "ladder": skips_newest(ladder, config.symbols),
        }
        positions = torch.arange(shape.seq, device=device)[:, None]
        self.context = Context(positions.expand(shape.seq, shape.batch))
        generator = torch.Generator().manual_seed(0)
        both = torch.randn(2, shape.seq, shape.batch, shape.hidden, generator=generator)
        if sequence:
            both = both.chunk(RANKS, dim=1)[mesh.get_local_rank("tp")]
        self.stream, self.cotangent = both.to(device, shape.dtype).unbind()

    def become(self, residual: str, seams: Seams | None = None) -> None:
        """Wire the stream as `residual` says, with these seams or else its own; no gradients."""
        wiring = self.wiring
        wiring.skips_newest = self.skips_newest[residual]
        wiring.enter, wiring.leave = seams or self.seams
        wiring.zero_grad()

    def forward(self) -> Tensor:
        """The end of the stream."""
        return self.wiring(self.stream.clone().requires_grad_(), self.context)[0]

    def backward(self, end: Tensor) -> None:
        """Gradients of all parameters and of the stream."""
        end.backward(self.cotangent)


def hidden(took: dict[str, list[float]], blocks: int) -> dict[str, float]:
    """How much communication hides in one direction, of each variant's seconds, round by round.

    The ends stay exposed: in each direction one sub-block of the row has no other beside which its
    communication could run.
    """
    middle = {name: statistics.median(values) for name, values in took.items()}
    exposed = middle["standard"] - middle["none"]
    return {
        **{f"{name} ms": 1000 * middle[name] for name in VARIANTS},
        "hidden": (middle["standard"] - middle["ladder"]) / exposed,
        "bound by the ends": 1 - 1 / blocks,
    }


def steps(total: dict[str, list[float]]) -> dict[str, float]:
    """Of each variant's seconds a step, round by round, how they compare."""
    rounds = list(zip(*(total[name] for name in VARIANTS), strict=True))
    return {
        "communication / standard step": statistics.median((s - n) / s for n, s, _ in rounds),
        "step, standard / ladder": statistics.median(s / fast for _, s, fast in rounds),
        "step, without communication / ladder": statistics.median(n / f for n, _, f in rounds),
    }
