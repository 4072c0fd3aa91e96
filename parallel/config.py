"""The `[parallel]` table: how ranks divide one model and one batch."""

from pydantic import BaseModel, Field


class ParallelConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Degrees of parallelism; their product is the number of ranks."""

    dp_replicate: int = Field(1, ge=1, description="copies of the sharded model (HSDP)")
    dp_shard: int | None = Field(
        None, ge=1, description="ranks that share one copy (FSDP2); default: all that are left"
    )

    def degrees(self, world_size: int) -> dict[str, int]:
        """Every axis with its degree, the default filled in (0 where the ranks do not divide)."""
        shard = self.dp_shard if self.dp_shard is not None else world_size // self.dp_replicate
        return {"dp_replicate": self.dp_replicate, "dp_shard": shard}
