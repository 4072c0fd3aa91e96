"""Rules on what a run does about silent corruption and bad data."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import Rules
from colonnade.launcher.recipe.rules.layout import fits
from colonnade.launcher.recipe.tables import Recipe
from colonnade.parallel.config import ParallelConfig

RULES = Rules()


@RULES.add("guard.spike", "checkpoint.every", "checkpoint.minutes")
def checkpoints_to_go_back_to(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A run that goes back after a spike has checkpoints to go back to."""
    if r.guard.spike and not r.checkpoint.every and not r.checkpoint.minutes:
        remedy = "a spike takes the run back to a checkpoint, and it saves none before its end; set"
        remedy += " checkpoint.every, or guard.spike to 0"
        yield Fault("guard.spike", r.guard.spike, remedy)


@RULES.add("guard.spike", "checkpoint.every", "checkpoint.keep")
def checkpoints_before_what_is_skipped(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The oldest checkpoint that is kept is before the first step that is passed over."""
    every, keep = r.checkpoint.every, r.checkpoint.keep
    longest = 1 + every * (keep - 1)  # where the newest is of the step before the spike
    if r.guard.spike and every and r.guard.skip > longest:
        wanted = 1 - (1 - r.guard.skip) // every
        remedy = f"with checkpoint.every = {every} and checkpoint.keep = {keep} a checkpoint "
        remedy += f"before them may be deleted already; set it to at most {longest}, or "
        yield Fault("guard.skip", r.guard.skip, f"{remedy}checkpoint.keep to {wanted}")


@RULES.add("guard.replay_every", "train.deterministic")
def replay_compares_bits(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """What is compared bit by bit is computed deterministically."""
    if r.guard.replay_every and not r.train.deterministic:
        remedy = "results are compared bit by bit; set train.deterministic to true, or "
        yield Fault("guard.replay_every", r.guard.replay_every, f"{remedy}guard.replay_every to 0")


@RULES.add("guard.replay_every", "parallel")
def replay_needs_replicas(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Another group of ranks computes the same; an elastic job may come to have one."""
    p = r.parallel
    if not r.guard.replay_every or world_size is None or p.elastic or not fits(r, world_size):
        return
    if replicas(p, world_size) < 2:
        cause = f"parallel.ep = {p.ep}" if p.ep > 1 else "the layout"
        ranks = "one rank" if world_size == 1 else f"the {world_size} ranks"
        remedy = f"{cause} makes one replica of {ranks}, and no other could repeat its micro-"
        remedy += "batches; use more ranks, or set guard.replay_every to 0"
        yield Fault("guard.replay_every", r.guard.replay_every, remedy)


def replicas(parallel: ParallelConfig, world_size: int) -> int:
    """How many groups of ranks compute micro-batches without exchanging tokens with each other."""
    degrees = parallel.degrees(world_size)
    ranks = degrees["dp_replicate"] * degrees["dp_shard"]
    return ranks // parallel.data_ranks_of_replica
