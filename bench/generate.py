"""`bench generate`: tokens per second at growing contexts, and ladder beside standard on two hosts.

An attention, a hybrid and a Mamba-2 row with the same number of parameters take turns, a token
each, at every context. Their caches are filled with random keys, values and states: what a token
costs depends on how many they are alone. The floor of a token is the time in which its weights and
its cache are read once at the measured bandwidth.

The ladder residual, the standard one, and the same without communication then take turns on a row
of attention and MLP, whose two tensor-parallel ranks are on simulated hosts (`hosts`), over a link
so slow that communication takes about a third of the standard step, as in `bench ladder`.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colonnade.bench import ladder, row
from colonnade.bench.hosts import Hosts, unsupported_reason
from colonnade.bench.ladder import Sample, TimedRank, calibrate, identity, step_seconds, timed
from colonnade.bench.row import COMMUNICATION_SHARE, RANKS, VARIANTS, Shape, TensorRow
from colonnade.bench.timing import alternate, median_ratio
from colonnade.launcher.cluster.environment import cores
from colonnade.models.cache import Cache, Rows
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.materialise import new_decoder
from colonnade.parallel.mesh import build_mesh
from colonnade.parallel.passes import Passes, evaluating

CONTEXTS = (1024, 4096, 16384, 65536)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """Sizes of the rows whose tokens are timed.

    Attributes:
        hidden: width of the stream.
        layers: sequence mixers, each with an MLP behind it.
        attention: how many of the mixers of the hybrid are attention.
    """

    hidden: int = 512
    layers: int = 12
    attention: int = 1

    def patterns(self) -> dict[str, str]:
        """The rows by name; attention stands in the middle of the hybrid."""
        mamba = self.layers - self.attention
        before = "M-" * (mamba // 2)
        return {
            "attention": "*-" * self.layers,
            "hybrid": before + "*-" * self.attention + "M-" * (mamba - mamba // 2),
            "mamba": "M-" * self.layers,
        }

    def config(self, pattern: str, ffn: int) -> ModelConfig:
        """A row with MLPs of this width; four query heads share a head of keys and values."""
        D = self.hidden
        return ModelConfig(
            pattern=pattern, hidden=D, heads=D // 64, kv_heads=max(1, D // 256), head_dim=64,
            ffn=ffn, mamba_heads=2 * D // 64, mamba_head_dim=64, mamba_state=128, vocab=4096,
        )  # fmt: skip

    def models(self) -> dict[str, Decoder]:
        """The rows with random weights; the MLPs of each are so wide that all are of one size."""
        unit = 3 * self.hidden * self.layers  # parameters of one column of the MLPs
        sizes = {name: count(self.config(p, 1)) for name, p in self.patterns().items()}
        wanted = max(sizes.values()) + unit * 2 * self.hidden
        return {
            name: new_decoder(self.config(pattern, 1 + (wanted - sizes[name]) // unit))
            for name, pattern in self.patterns().items()
        }


def count(config: ModelConfig) -> int:
    """The number of parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


def fill(cache: Cache, context: int) -> None:
    """Makes the cached rows of one token random ones of `context` tokens."""
    generator = torch.Generator().manual_seed(0)
    for key, rows in cache.rows.items():
        like = rows.kept()
        shape = context, *like.shape[1:]
        cache.rows[key] = Rows(torch.randn(shape, generator=generator, dtype=like.dtype))


def cache_bytes(cache: Cache) -> int:
    """The bytes of a cache."""
    tensors = [*cache.tensors.values(), *(rows.kept() for rows in cache.rows.values())]
    return sum(t.nbytes for t in tensors)


class Text:
    """A text of `context` random tokens that grows by a token at a time."""

    def __init__(self, model: Decoder, context: int) -> None:
        self.passes, self.cache, self.length = Passes(model, CPU), Cache(), 0
        self.advance()
        fill(self.cache, context)
        self.length = context
        self.bytes = cache_bytes(self.cache) + sum(p.nbytes for p in model.parameters())
        self.advance()  # its buffers now have room

    def advance(self) -> Tensor:
        """Adds a token; returns the logits of the next one."""
        positions = torch.tensor([[self.length]])
        self.length += 1
        with evaluating(self.passes.model):
            return self.passes.next_logits(positions % 7, Context(positions, cache=self.cache))


def read_bandwidth(size: int = 1 << 26) -> float:
    """Bytes/s that a product of a large matrix with a vector reads."""
    matrix, vector = torch.randn(size // 4096, 4096), torch.randn(4096)
    seconds = alternate({"read": lambda: torch.mv(matrix, vector)}, rounds=9)["read"]
    return matrix.nbytes / min(seconds)


def at_context(models: dict[str, Decoder], context: int, rounds: int) -> dict[str, Any]:
    """The figures of a context."""
    texts = {name: Text(model, context) for name, model in models.items()}
    advances: dict[str, Callable[[], object]] = {n: t.advance for n, t in texts.items()}
    bandwidth = read_bandwidth()
    seconds = alternate(advances, rounds, warmup=2)
    figures: dict[str, Any] = {"read GB/s": bandwidth / 1e9}
    for name, text in texts.items():
        median, floor = statistics.median(seconds[name]), text.bytes / bandwidth
        figures |= {
            f"{name} tokens/s": 1 / median,
            f"{name} ms": 1e3 * median,
            f"{name} floor ms": 1e3 * floor,
            f"{name} MB read": text.bytes / 1e6,
        }
    for name in ("hybrid", "mamba"):
        ratio = median_ratio(seconds["attention"], seconds[name])
        figures[f"{name} / attention, speed"] = ratio
    return figures


class DecodeRank(TimedRank):
    """One rank of a row that generates a token of every text of a batch."""

    def build(self, shape: Shape, context: int) -> None:
        """Builds the row and a cache of `context` tokens."""
        mesh = build_mesh(ParallelConfig(tp=RANKS), self.world)
        self.row = TensorRow(shape, "*-", False, mesh, self.world.device)
        self.row.wiring.eval()
        self.set_variants((identity, identity))
        self.cache, self.context = Cache(), context
        self.forward()
        fill(self.cache, context)
        self.forward()

    def forward(self) -> Tensor:
        """Runs the row on one token of every text; each call is of a later token."""
        stream = self.row.stream
        positions = torch.full(stream.shape[:2], self.context)
        self.context += 1
        with torch.no_grad():
            return self.row.wiring(stream, Context(positions, cache=self.cache))[0]

    def step(self, variant: str) -> Sample:
        """Generates four tokens, for the link's buckets fill in between."""
        self.row.rewire(*self.variants[variant])
        sent, machine = self.bytes_sent(), ladder.machine_cpu_seconds()
        _, seconds, cpu = timed(lambda: [self.forward() for _ in range(4)])
        machine = ladder.machine_cpu_seconds() - machine
        return Sample(seconds / 4, 0.0, cpu / 4, 0.0, machine, (self.bytes_sent() - sent) // 4)


def on_hosts(shape: Shape, context: int, rounds: int, share: float) -> dict[str, Any]:
    """The figures of ladder between two hosts."""
    with Hosts(DecodeRank) as hosts:
        hosts.call("build", shape, context)
        rate = calibrate(hosts, share, tries=min(3, rounds))
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(rounds):
            for variant in VARIANTS:
                seconds[variant].append(step_seconds(hosts.call("step", variant)))
    figures: dict[str, Any] = {"link Mbit/s": 8e-6 * rate}
    figures |= {f"{name} ms": 1e3 * statistics.median(of) for name, of in seconds.items()}
    return figures | row.step_figures(seconds)


LADDER_SHAPE, LADDER_CONTEXT = Shape(repeat=8, hidden=512, seq=1, batch=64), 128


def run(
    size: Size = Size(),
    contexts: tuple[int, ...] = CONTEXTS,
    rounds: int = 15,
    shape: Shape = LADDER_SHAPE,
    share: float = COMMUNICATION_SHARE,
) -> dict[str, Any]:
    """Medians over rounds in which the rows, and then the residuals, take turns.

    The second part needs root, for simulated hosts; elsewhere the report says why it is missing.
    """
    models, threads = size.models(), torch.get_num_threads()
    report: dict[str, Any] = {
        "rows": f"{size}; fp32, one text, 1 thread, {cores()} cores",
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()},
    }
    torch.set_num_threads(1)
    try:
        for context in contexts:
            figures = at_context(models, context, rounds)
            report |= {f"{context}: {name}": value for name, value in figures.items()}
    finally:
        torch.set_num_threads(threads)
    del models
    if (reason := unsupported_reason()) is not None:
        return {**report, "ladder": f"not measured: {reason}"}
    report["ladder"] = f"{shape}; {LADDER_CONTEXT} tokens of context, over gloo, 1 thread a rank"
    figures = on_hosts(shape, LADDER_CONTEXT, rounds, share)
    return report | {f"ladder: {name}": value for name, value in figures.items()}
