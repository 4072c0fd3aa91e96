"""The `[parallel]` table: the degree of each kind of parallelism, and its options."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, Field

LOOPED = ("interleaved", "bfs", "zb1p")  # stage s is on rank s mod pp, several stages on a rank
V_SHAPED = ("zbv", "dualpipev")  # rank r has the stages r and 2 pp - 1 - r


class ParallelConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Degrees of parallelism; their product is the number of ranks."""

    dp_replicate: int = Field(1, ge=1, le=2**20, description="copies of the sharded model (HSDP)")
    dp_shard: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="ranks that shard one copy (FSDP2); default: all remaining ranks",
    )
    tp: int = Field(
        1, ge=1, le=2**20, description="ranks that shard the weights of every sub-block"
    )
    sequence: bool = Field(
        True, description="between sub-blocks, tensor-parallel ranks hold shards of the sequence"
    )
    cp: int = Field(1, ge=1, le=2**20, description="ranks that shard every sequence")
    zigzag: bool = Field(
        True,
        description="of 2 cp segments rank r holds r and 2 cp - 1 - r, which is equal work for "
        "causal attention; false: one segment each",
    )
    context: Literal["ring", "ulysses", "ring+ulysses", "allgather"] = Field(
        "ring", description="how attention communicates over the ranks that shard a sequence"
    )
    ulysses: int | None = Field(
        None,
        ge=2,
        le=2**20,
        description="ranks that exchange heads in ring+ulysses; default: as many as heads allow",
    )
    recurrence: Literal["states", "heads"] = Field(
        "states",
        description="what Mamba and DeltaNet exchange over the ranks that shard a sequence: states "
        "between segments, or heads",
    )
    timeout: int = Field(
        1800,
        ge=1,
        le=2**20,
        description="seconds that a collective may take before the job ends",
    )
    elastic: bool = Field(
        False,
        description="the number of ranks may change between starts: data-parallel ranks need not "
        "divide the micro-batches of a step, those without one repeat another without labels",
    )
    pp: int = Field(1, ge=1, le=2**20, description="ranks of a pipeline, which divide the row")
    schedule: Literal["gpipe", "1f1b", "interleaved", "bfs", "zb1p", "zbv", "dualpipev"] = Field(
        "1f1b",
        description="order of a pipeline's passes; interleaved, bfs (breadth first) and zb1p (zero "
        "bubble) may have several stages on a rank, zbv and dualpipev have two, placed in a V",
    )
    stages_per_rank: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="stages of each rank of a pipeline; default: 2 (zb1p: 1)",
    )
    stages: Annotated[tuple[Annotated[int, Field(ge=1)], ...] | None, Field(strict=False)] = Field(
        None,
        description="sub-blocks of each stage, such as [3, 5]; default: by their estimated cost",
    )
    ep: int = Field(1, ge=1, le=2**20, description="ranks that the experts are divided among")
    etp: int | None = Field(
        None, ge=1, le=2**20, description="ranks that shard each expert; default: tp"
    )

    def degrees(self, world_size: int) -> dict[str, int]:
        """Every axis of the dense view with its degree, the default filled in.

        0 where the ranks do not divide.
        """
        others = self.pp * self.dp_replicate * self.cp * self.tp
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard or world_size // others,
            "cp": self.cp,
            "tp": self.tp,
        }

    @property
    def stages_of_rank(self) -> int:
        """How many stages of a pipeline each rank has."""
        if self.schedule in V_SHAPED:
            return 2
        if self.schedule not in LOOPED:
            return 1
        return self.stages_per_rank or (1 if self.schedule == "zb1p" else 2)

    @property
    def stage_count(self) -> int:
        """How many stages the pipeline has; 1 without a pipeline."""
        return self.pp * self.stages_of_rank if self.pp > 1 else 1

    @property
    def segments(self) -> int:
        """How many segments the context group shards a sequence into."""
        return 1 if self.cp == 1 else self.cp * (2 if self.zigzag else 1)

    def ulysses_degree(self, heads: int) -> int:
        """How many ranks exchange heads by an all-to-all, where each has `heads` query heads.

        It is 1 where attention exchanges none. For ring+ulysses the default is the largest proper
        divisor of cp that divides `heads` (for a prime cp: cp itself); 0 where there is none.
        """
        if self.cp == 1 or self.context in ("ring", "allgather"):
            return 1
        if self.context == "ulysses":
            return self.cp
        proper = [d for d in range(self.cp - 1, 1, -1) if self.cp % d == 0] or [self.cp]
        return self.ulysses or next((d for d in proper if heads % d == 0), 0)

    @property
    def folds_experts(self) -> bool:
        """Whether experts are sharded over other ranks than the rest of a sub-block."""
        return self.ep > 1 or (self.etp or self.tp) != self.tp

    def expert_degrees(self, world_size: int) -> dict[str, int]:
        """Every axis of the expert view with its degree: edp · ep · etp = dp_shard · cp · tp."""
        dense = self.degrees(world_size)
        etp = self.etp or self.tp
        folded = dense["dp_shard"] * dense["cp"] * dense["tp"]
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "edp": folded // (self.ep * etp),
            "ep": self.ep,
            "etp": etp,
        }

    @property
    def data_ranks_of_replica(self) -> int:
        """How many consecutive data-parallel ranks compute their micro-batches together: one, or as
        many as send tokens to the ranks of each other's experts."""
        if not self.folds_experts:
            return 1
        inner = self.cp * self.tp
        return math.lcm(inner, self.ep * (self.etp or self.tp)) // inner

    def layout(self, world_size: int) -> dict[str, int]:
        """The axes of both views that have several ranks, with their degrees."""
        degrees = self.degrees(world_size)
        if self.folds_experts:
            degrees |= self.expert_degrees(world_size)
        return {axis: degree for axis, degree in degrees.items() if degree > 1}
