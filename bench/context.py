"""`bench context`: a sequence over several ranks: each rank's work, time, memory and bytes sent.

Ranks are processes of this host with one thread each; everything is fp32.
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
from colonnade.bench.mixers import saved_bytes
from colonnade.bench.timing import median_ratio
from colonnade.bench.worker_pool import RankPool
from colonnade.kernels.attention import attention
from colonnade.kernels.tiles import ScoreOptions
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.cluster.memory import resident_mib
from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.launcher.recipe.unused import is_recurrent
from colonnade.launcher.train.job import build_engine
from colonnade.launcher.train.step import train_step
from colonnade.models.blocks.attention import Softmax, local_attend
from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.context import Context
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.context.attention import context_attention
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.plug import context_attend
from colonnade.parallel.context.ring import Ring
from colonnade.parallel.mesh import build_mesh
from colonnade.parallel.world import World

Report = dict[str, Any]
RANKS = 4
PEAK_LIMIT = 2048  # MiB of a rank


# Work, counted.


def work_balance(ranks: int) -> Report:
    """Counts the scores that each rank computes in a ring, and those on the critical path.

    The critical path sums, over the ring's steps, the scores of the rank that has most of them.
    """
    case, critical_path, report = f"work, cp {ranks}", {}, Report()
    for zigzag, layout in ((True, "zigzag"), (False, "contiguous")):
        length = 2 if zigzag else 4  # of a segment, so that a rank has 4 tokens either way
        rings = [
            Ring(SequenceSharding(ranks, rank, zigzag), length, ScoreOptions(1.0), False)
            for rank in range(ranks)
        ]
        steps = [[ring.score_count(step) for ring in rings] for step in range(ranks)]
        by_rank = [sum(scores) for scores in zip(*steps, strict=True)]
        report[f"{case}: {layout}, largest of a rank / smallest"] = max(by_rank) / min(by_rank)
        critical_path[layout] = sum(map(max, steps))
    ratio = critical_path["contiguous"] / critical_path["zigzag"]
    return report | {
        f"{case}: longest way, contiguous / zigzag": ratio,
        f"{case}: limit of that": 2 - 1 / ranks,
    }


# Attention: time and memory.


@dataclass(frozen=True)
class Shape:
    """Sizes of attention, batch 1."""

    tokens: int = 8192
    heads: int = 4
    kv_heads: int = 2
    width: int = 64

    def local_qkv(self, ranks: int) -> list[Tensor]:
        """Random queries, keys and values of one of `ranks` ranks, `[S / ranks, 1, H, P]`.

        They require gradients.
        """
        return [
            torch.randn(self.tokens // ranks, 1, heads, self.width).requires_grad_()
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.heads} heads of width {self.width}, {self.kv_heads} "
            "key heads, batch 1, fp32"
        )


TIMED_SHAPE, MEMORY_SHAPE = Shape(), Shape(tokens=4096, heads=8, kv_heads=4)


def forward_backward(attend: Callable[..., Tensor], qkv: list[Tensor]) -> Callable[[], object]:
    """An action that runs attention forward and backward."""
    grad = torch.randn_like(qkv[0])
    return lambda: torch.autograd.grad(attend(*qkv), qkv, grad)


def attention_seconds(world: World, shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Times attention forward and backward on this rank; returns the seconds by round.

    Ranks 0 and 1 attend over one sequence, each with half of it. Then rank 0 attends over all of
    it in one process. The other ranks wait.
    """
    torch.manual_seed(world.rank)
    group = build_mesh(ParallelConfig(cp=2), world)["cp"].get_group()
    score_options = ScoreOptions(shape.width**-0.5)
    local_qkv, full_qkv = shape.local_qkv(2), shape.local_qkv(1)

    def sharded(zigzag: bool) -> Callable[..., Tensor]:
        return lambda q, k, v: context_attention(
            q, k, v, group, score_options=score_options, zigzag=zigzag
        )

    candidates = {  # name: number of ranks that compute, action
        "zigzag": (2, forward_backward(sharded(True), local_qkv)),
        "contiguous": (2, forward_backward(sharded(False), local_qkv)),
        "one process": (1, forward_backward(attention, full_qkv)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(1 + rounds):
        for name, (ranks, action) in candidates.items():
            dist.barrier()
            start = time.perf_counter()
            if world.rank < ranks:
                action()
            if round_index > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def attention_times(pool: RankPool, shape: Shape, rounds: int) -> Report:
    """The slower rank's times, medians of rounds in which all take turns."""
    by_rank = pool.run(attention_seconds, shape, rounds)
    seconds = {
        name: [max(times) for times in zip(*(of_rank[name] for of_rank in by_rank), strict=True)]
        for name in by_rank[0]
    }
    return {
        "time, cp 2": f"attention, forward and backward, {shape}; 1 thread a rank, {cores()} cores",
        **{f"time, cp 2: {n} ms": 1e3 * statistics.median(s) for n, s in seconds.items()},
        "time, cp 2: contiguous / zigzag": median_ratio(seconds["contiguous"], seconds["zigzag"]),
        "time, cp 2: limit of that": 1.5,
        "time, cp 2: one process / zigzag": median_ratio(seconds["one process"], seconds["zigzag"]),
    }


def attention_bytes(world: World, variant: Any, cp: int, shape: Shape) -> int:
    """Bytes that attention saves for backward on a rank, its inputs included."""
    parallel = ParallelConfig(cp=cp, context=variant)
    mesh = build_mesh(parallel, world)["cp"]
    attend = local_attend if cp == 1 else context_attend(mesh, parallel, shape.heads)
    (q, k, v), softmax = shape.local_qkv(cp), Softmax(shape.width**-0.5)
    context = Context(torch.arange(len(q))[:, None])
    return saved_bytes(lambda: attend(q, k, v, softmax, context).sum(), [])


def attention_memory(pool: RankPool, shape: Shape) -> Report:
    """MiB that attention saves for backward, of the rank that saves most, by variant and degree.

    The ratio `times cp / cp 1` is 1 where each rank saves 1 / cp of what one process does.
    """
    report: Report = {"kept": f"by attention, its inputs included, {shape}"}
    for variant in ("ring", "allgather", "ulysses"):
        one_rank = None  # bytes at cp 1
        for cp in (cp for cp in (1, 2, 4) if cp <= pool.size):
            size = max(pool.run(attention_bytes, variant, cp, shape))
            one_rank = one_rank or size
            report[f"kept, {variant}, cp {cp}: MiB a rank"] = size / 2**20
            if cp > 1:
                report[f"kept, {variant}, cp {cp}: times cp / cp 1"] = size * cp / one_rank
    return report


# Peak memory of a hybrid's training step.

HYBRID = ModelConfig(
    pattern="M-*-", hidden=128, heads=2, head_dim=32, ffn=352, mamba_state=64, vocab=256
)


class StepMemory(NamedTuple):
    """Resident memory of a rank in MiB before a step and at its peak, and the step's seconds."""

    before: float
    peak: float
    seconds: float


def one_step_recipe(
    model: ModelConfig, parallel: ParallelConfig, tokens: int, rows: int = 1
) -> Recipe:
    """A recipe of one step with one micro-batch of `rows` rows of `tokens` tokens."""
    return Recipe(
        model=model,
        parallel=parallel,
        train=TrainConfig(steps=1, global_batch=rows, micro_batch=rows, seq_len=tokens),
    )


def reset_peak() -> None:
    """Resets the peak of resident memory to the present value, where the system can: on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def step_memory(world: World, recipe: Recipe) -> StepMemory:
    """Measures a first training step on one row, which is sharded over all ranks."""
    engine = build_engine(recipe, world)
    batch = traffic.random_batch(1, recipe.train.seq_len, recipe.model.vocab)
    reset_peak()
    before = resident_mib()
    dist.barrier()
    start = time.perf_counter()
    train_step(engine, [batch], [[0]], training_stages(recipe)[0], 0)
    return StepMemory(before, resident_mib(), time.perf_counter() - start)


def step_peaks(model: ModelConfig, lengths: Sequence[int], ranks: int) -> Report:
    """The memory of the rank that takes most, with new processes for each length."""
    layout = f"cp {ranks}, zigzag, ring and states, nothing recomputed, fp32, AdamW"
    report: Report = {"step": f"{model.pattern}, hidden {model.hidden}, {layout}"}
    rises, peaks = [], []  # MiB, by length
    for tokens in lengths:
        recipe = one_step_recipe(model, ParallelConfig(cp=ranks), tokens)
        with RankPool(ranks) as pool:
            by_rank = pool.run(step_memory, recipe)
        rises.append(max(m.peak - m.before for m in by_rank))
        peaks.append(max(m.peak for m in by_rank))
        report |= {
            f"step, {tokens} tokens: peak MiB of a rank": peaks[-1],
            f"step, {tokens} tokens: MiB above those before the step": rises[-1],
            f"step, {tokens} tokens: seconds": max(m.seconds for m in by_rank),
        }
    growth = lengths[-1] / lengths[0]
    return report | {
        "step: limit of the peak": PEAK_LIMIT,
        "step: growth of tokens": growth,
        "step: growth of the peak / of tokens": peaks[-1] / peaks[0] / growth,
        "step: growth of what is above those before / of tokens": rises[-1] / rises[0] / growth,
    }


# Bytes sent.

SMALL = ModelConfig(hidden=128, heads=8, kv_heads=4, delta_key_dim=16, vocab=64)


def bytes_sent(pool: RankPool, tokens: int) -> Report:
    """Bytes that the busiest rank sends, counted and by formula, and whether all ranks' agree."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {  # name: pattern, fields of `[parallel]`
        variant: ("*", {"context": variant})
        for variant in ("ring", "ulysses", "ring+ulysses", "allgather")
    }
    recurrent = [symbol for symbol, card in CARDS.items() if is_recurrent(card)]
    for symbol, recurrence in itertools.product(recurrent, ("states", "heads")):
        cases[f"{symbol}, {recurrence}"] = symbol, {"recurrence": recurrence}
    report: Report = {}
    for name, (pattern, options) in cases.items():
        model = SMALL.changed(pattern=pattern)
        recipe = one_step_recipe(model, ParallelConfig(cp=pool.size, **options), tokens)
        counted = pool.run(traffic.counted, recipe)
        formula = [traffic.formula(recipe, rank) for rank in range(pool.size)]
        report[f"sent, {name}: bytes a rank, counted"] = max(counted)
        report[f"sent, {name}: by formula"] = max(formula)
        report[f"sent, {name}: equal on all ranks"] = counted == formula
    return report


def run(
    timed_shape: Shape = TIMED_SHAPE,
    rounds: int = 7,
    memory_shape: Shape = MEMORY_SHAPE,
    model: ModelConfig = HYBRID,
    lengths: Sequence[int] = (2**14, 2**15, 2**16, 2**17),
    ranks: int = RANKS,
) -> Report:
    """Every figure beside its limit or reference.

    Args:
        timed_shape: of the attention that is timed.
        rounds: of timing.
        memory_shape: of the attention whose memory is measured.
        model: whose training step's memory is measured.
        lengths: in tokens, at which the step's memory is measured.
        ranks: over which a sequence is sharded, except for timing, which takes two.
    """
    report: Report = {}
    for degree in (2, 4, 8):
        report |= work_balance(degree)
    with RankPool(ranks) as pool:
        report |= attention_times(pool, timed_shape, rounds)
        report |= attention_memory(pool, memory_shape)
        report |= bytes_sent(pool, tokens=512)
    return report | step_peaks(model, lengths, ranks)
