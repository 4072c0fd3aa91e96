"""`bench context`: a sequence over several ranks: each one's work, time, memory and bytes sent.

Ranks are processes of this host with one thread each; all is fp32.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.bench import traffic
from colonnade.bench.crew import Ranks
from colonnade.bench.mixers import kept_bytes
from colonnade.bench.timing import median_ratio
from colonnade.kernels.attention import attention
from colonnade.kernels.tiles import ScoreOptions
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.cluster.memory import resident_mib
from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.launcher.recipe.unused import is_recurrent
from colonnade.launcher.train.job import build_model
from colonnade.launcher.train.step import train_step
from colonnade.models.blocks.attention import Softmax, local_attend
from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.context import Context
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.context.attention import context_attention
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.plug import context_attend
from colonnade.parallel.context.ring import Ring
from colonnade.parallel.engine import Engine
from colonnade.parallel.mesh import build_mesh
from colonnade.parallel.world import World

Report = dict[str, Any]
RANKS = 4
LIMIT = 2048  # MiB of a rank


# Work, counted.


def work(ranks: int) -> Report:
    """Scores that each rank computes in a ring, and the longest way through its steps."""
    case, longest, report = f"work, cp {ranks}", {}, Report()
    for zigzag, cut in ((True, "zigzag"), (False, "contiguous")):
        length = 2 if zigzag else 4
        rings = [
            Ring(SequenceSharding(ranks, rank, zigzag), length, ScoreOptions(1.0), False)
            for rank in range(ranks)
        ]
        steps = [[ring.score_count(step) for ring in rings] for step in range(ranks)]
        of_rank = [sum(scores) for scores in zip(*steps, strict=True)]
        report[f"{case}: {cut}, largest of a rank / smallest"] = max(of_rank) / min(of_rank)
        longest[cut] = sum(map(max, steps))
    return report | {
        f"{case}: longest way, contiguous / zigzag": longest["contiguous"] / longest["zigzag"],
        f"{case}: limit of that": 2 - 1 / ranks,
    }


# Attention, timed and weighed.


@dataclass(frozen=True)
class Shape:
    """Sizes of attention, batch 1."""

    tokens: int = 8192
    heads: int = 4
    kv_heads: int = 2
    width: int = 64

    def leaves(self, ranks: int) -> list[Tensor]:
        """Queries, keys and values of one of so many ranks, which want gradients."""
        return [
            torch.randn(self.tokens // ranks, 1, heads, self.width).requires_grad_()
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.heads} heads of width {self.width}, {self.kv_heads} "
            "key heads, batch 1, fp32"
        )


TIMED, WEIGHED = Shape(), Shape(tokens=4096, heads=8, kv_heads=4)


def both(attend: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    grad = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)


def attention_seconds(world: World, shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Of ranks 0 and 1 each with half of a sequence, and of rank 0 with all of it: by round."""
    torch.manual_seed(world.rank)
    group = build_mesh(ParallelConfig(cp=2), world)["cp"].get_group()
    score_options = ScoreOptions(shape.width**-0.5)
    halves, whole = shape.leaves(2), shape.leaves(1)

    def shared(zigzag: bool) -> Callable[..., Tensor]:
        return lambda q, k, v: context_attention(
            q, k, v, group, score_options=score_options, zigzag=zigzag
        )

    contestants = {
        "zigzag": (2, both(shared(True), halves)),
        "contiguous": (2, both(shared(False), halves)),
        "one process": (1, both(attention, whole)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1 + rounds):
        for name, (ranks, action) in contestants.items():
            dist.barrier()
            start = time.perf_counter()
            if world.rank < ranks:
                action()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def timed(crew: Ranks, shape: Shape, rounds: int) -> Report:
    """The slower rank's times, medians of rounds in which all take turns."""
    of_rank = crew.run(attention_seconds, shape, rounds)
    seconds = {
        name: [max(at_once) for at_once in zip(*(of[name] for of in of_rank), strict=True)]
        for name in of_rank[0]
    }
    return {
        "time, cp 2": f"attention, forward and backward, {shape}; 1 thread a rank, {cores()} cores",
        **{f"time, cp 2: {n} ms": 1e3 * statistics.median(s) for n, s in seconds.items()},
        "time, cp 2: contiguous / zigzag": median_ratio(seconds["contiguous"], seconds["zigzag"]),
        "time, cp 2: limit of that": 1.5,
        "time, cp 2: one process / zigzag": median_ratio(seconds["one process"], seconds["zigzag"]),
    }


def attention_bytes(world: World, variant: Any, cp: int, shape: Shape) -> int:
    """What attention keeps from forward to backward on a rank, its inputs included."""
    parallel = ParallelConfig(cp=cp, context=variant)
    mesh = build_mesh(parallel, world)["cp"]
    attend = local_attend if cp == 1 else context_attend(mesh, parallel, shape.heads)
    (q, k, v), softmax = shape.leaves(cp), Softmax(shape.width**-0.5)
    context = Context(torch.arange(len(q))[:, None])
    return kept_bytes(lambda: attend(q, k, v, softmax, context).sum(), [])


def kept(crew: Ranks, shape: Shape) -> Report:
    """The same by variant and degree, the largest rank's, and how far from a fair share it is."""
    report: Report = {"kept": f"by attention, its inputs included, {shape}"}
    for variant in ("ring", "allgather", "ulysses"):
        alone = None
        for cp in (cp for cp in (1, 2, 4) if cp <= crew.size):
            size = max(crew.run(attention_bytes, variant, cp, shape))
            alone = alone or size
            report[f"kept, {variant}, cp {cp}: MiB a rank"] = size / 2**20
            if cp > 1:
                report[f"kept, {variant}, cp {cp}: times cp / cp 1"] = size * cp / alone
    return report


# A step of a hybrid, at its peak.

HYBRID = ModelConfig(
    pattern="M-*-", hidden=128, heads=2, head_dim=32, ffn=352, mamba_state=64, vocab=256
)


class Memory(NamedTuple):
    """Of a rank, in MiB."""

    before: float
    peak: float
    seconds: float


def train(model: ModelConfig, parallel: ParallelConfig, tokens: int, rows: int = 1) -> Recipe:
    """One step of one micro-batch."""
    return Recipe(
        model=model,
        parallel=parallel,
        train=TrainConfig(steps=1, global_batch=rows, micro_batch=rows, seq_len=tokens),
    )


def forget_peak() -> None:
    """Have the largest resident memory so far be the present one, where the system can: Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def step_memory(world: World, recipe: Recipe) -> Memory:
    """A first training step, as it is made of one row that all ranks share."""
    mesh, model, optimizer = build_model(recipe, world)
    batch = traffic.random_batch(1, recipe.train.seq_len, recipe.model.vocab)
    forget_peak()
    before = resident_mib()
    dist.barrier()
    start = time.perf_counter()
    train_step(Engine(model, optimizer, mesh, world.device), [batch], [[0]], recipe, 0)
    return Memory(before, resident_mib(), time.perf_counter() - start)


def peaks(model: ModelConfig, lengths: Sequence[int], ranks: int) -> Report:
    """The largest rank's memory, with new processes for each length."""
    layout = f"cp {ranks}, zigzag, ring and states, nothing recomputed, fp32, AdamW"
    report: Report = {"step": f"{model.pattern}, hidden {model.hidden}, {layout}"}
    found = []
    for tokens in lengths:
        with Ranks(ranks) as crew:
            of_rank = crew.run(step_memory, train(model, ParallelConfig(cp=ranks), tokens))
        rise, peak = max(m.peak - m.before for m in of_rank), max(m.peak for m in of_rank)
        found.append((rise, peak))
        report |= {
            f"step, {tokens} tokens: peak MiB of a rank": peak,
            f"step, {tokens} tokens: MiB above those before the step": rise,
            f"step, {tokens} tokens: seconds": max(m.seconds for m in of_rank),
        }
    longer = lengths[-1] / lengths[0]
    rise, peak = (last / first for first, last in zip(found[0], found[-1], strict=True))
    return report | {
        "step: limit of the peak": LIMIT,
        "step: growth of tokens": longer,
        "step: growth of the peak / of tokens": peak / longer,
        "step: growth of what is above those before / of tokens": rise / longer,
    }


# Bytes sent.

SMALL = ModelConfig(hidden=128, heads=8, kv_heads=4, delta_key_dim=16, vocab=64)


def sent(crew: Ranks, tokens: int) -> Report:
    """What the busiest rank sends, counted and by formula, and whether both are equal on all."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        variant: ("*", {"context": variant})
        for variant in ("ring", "ulysses", "ring+ulysses", "allgather")
    }
    recurrent = [symbol for symbol, card in CARDS.items() if is_recurrent(card)]
    for symbol, recurrence in itertools.product(recurrent, ("states", "heads")):
        cases[f"{symbol}, {recurrence}"] = symbol, {"recurrence": recurrence}
    report: Report = {}
    for name, (pattern, options) in cases.items():
        model = SMALL.changed(pattern=pattern)
        recipe = train(model, ParallelConfig(cp=crew.size, **options), tokens)
        counted = crew.run(traffic.counted, recipe)
        formula = [traffic.formula(recipe, rank) for rank in range(crew.size)]
        report[f"sent, {name}: bytes a rank, counted"] = max(counted)
        report[f"sent, {name}: by formula"] = max(formula)
        report[f"sent, {name}: equal on all ranks"] = counted == formula
    return report


def run(
    shape: Shape = TIMED,
    rounds: int = 7,
    weighed: Shape = WEIGHED,
    model: ModelConfig = HYBRID,
    lengths: Sequence[int] = (2**14, 2**15, 2**16, 2**17),
    ranks: int = RANKS,
) -> Report:
    """Every figure beside its limit or reference.

    Args:
        shape: of attention that is timed.
        rounds: of timing.
        weighed: of attention whose memory is measured.
        model: whose step's memory is measured.
        lengths: in tokens, at which it is.
        ranks: that share a sequence, but for timing: there it is two.
    """
    report: Report = {}
    for degree in (2, 4, 8):
        report |= work(degree)
    with Ranks(ranks) as crew:
        report |= timed(crew, shape, rounds)
        report |= kept(crew, weighed)
        report |= sent(crew, tokens=512)
    return report | peaks(model, lengths, ranks)
