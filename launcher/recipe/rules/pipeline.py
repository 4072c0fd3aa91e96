"""Rules on pipelines: stages, micro-batches of a step, compilation."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import ROW_FIELDS, Rules, divisors, nearest_values
from colonnade.launcher.recipe.rules.layout import fits
from colonnade.launcher.recipe.tables import Recipe
from colonnade.parallel.pipeline.placement import SPLIT_BACKWARD, micro_batches_fit

RULES = Rules()


@RULES.add(*ROW_FIELDS, "parallel.pp", "parallel.schedule", "parallel.stages_per_rank")
def stage_count(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every stage of a pipeline has at least one sub-block."""
    p, count = r.parallel, len(r.model.symbols)
    if p.pp == 1 or r.model.has_unknown_symbols or p.stage_count <= count:
        return
    stages = f"{p.pp} x {p.stages_of_rank} = {p.stage_count}"
    what = f"there are parallel.pp x stages of a rank = {stages} stages, and the row has {count} "
    what += f"sub-block{'s' * (count > 1)}"
    largest, per_rank = count // p.stages_of_rank, count // p.pp
    if p.stages_of_rank > 1 and p.stages_per_rank is not None and per_rank:
        remedy = f"{what}; set parallel.stages_per_rank to at most {per_rank}"
        yield Fault("parallel.stages_per_rank", p.stages_per_rank, remedy)
        return
    degrees = [d for d in divisors(world_size or p.pp) if d <= largest]
    remedy = f"{what}; set parallel.pp to {nearest_values(degrees, p.pp)}" if degrees else what
    if p.stages_of_rank > 1 and per_rank:
        remedy += f"{', or' if degrees else '; set'} parallel.schedule to 1f1b or gpipe"
    elif not degrees:
        remedy += "; set parallel.pp to 1"
    yield Fault("parallel.pp", p.pp, remedy)


@RULES.add(*ROW_FIELDS, "parallel.pp", "parallel.schedule", "parallel.stages_per_rank")
def stage_sizes(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """`parallel.stages` has a number for each stage, and together they are the whole row."""
    p = r.parallel
    if p.pp == 1 or p.stages is None or r.model.has_unknown_symbols:
        return
    stages, count = p.stage_count, len(r.model.symbols)
    if len(p.stages) == stages and sum(p.stages) == count:
        return
    found = f"they are {len(p.stages)} numbers with the sum {sum(p.stages)}"
    wanted = f"{stages} stages of together {count} sub-blocks"
    example = [count // stages + (i < count % stages) for i in range(stages)]
    remedy = f"{found}, but there are {wanted}; set it to such numbers, as {example}, or leave it "
    yield Fault("parallel.stages", list(p.stages), f"{remedy}out")


@RULES.add(
    "parallel", "train.global_batch", "train.micro_batch", "train.ramp_batch", "train.ramp_steps"
)
def micro_batches(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A step has as many micro-batches as the schedule needs, also in every step of a ramp."""
    p, t = r.parallel, r.train
    if p.pp == 1 or world_size is None or not fits(r, world_size):
        return
    degrees = p.degrees(world_size)
    dp = degrees["dp_replicate"] * degrees["dp_shard"]
    if t.global_batch % (t.micro_batch * (1 if p.elastic else dp)):
        return  # the rule `batch` reports it
    for rows in batch_sizes(r):
        count = t.passes_of_rank(rows, dp)
        if not (why := micro_batches_fit(p, count)):
            continue
        steps = f"a step of {rows} rows has" if t.ramp_batch is not None else "a step has"
        remedy = f"parallel.schedule = {p.schedule} {why}, and {steps} {count}, {rows} / "
        remedy += f"({t.micro_batch} x {dp} data-parallel ranks); "
        sizes = [s for s in divisors(rows // dp) if not micro_batches_fit(p, rows // dp // s)]
        if sizes:
            remedy += f"set train.micro_batch to {nearest_values(sizes, t.micro_batch)}, or "
        remedy += f"parallel.schedule to {'bfs' if p.stages_of_rank > 1 else 'gpipe'}"
        yield Fault("train.micro_batch", t.micro_batch, remedy)
        return


def batch_sizes(r: Recipe) -> Iterator[int]:
    """Yields the numbers of rows that steps of the run have: in a ramp multiples of its first
    batch, one after the other, or, in a ramp of fewer steps than multiples, some of them."""
    t = r.train
    yield t.global_batch
    if t.ramp_batch is not None and t.ramp_steps and t.global_batch % t.ramp_batch == 0:
        units = t.global_batch // t.ramp_batch - 1
        steps = min(units, t.ramp_steps)
        yield from (t.ramp_batch * (1 + units * step // steps) for step in range(steps))


@RULES.add("parallel.pp", "parallel.schedule")
def compiled_split(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Compiled halves compute the gradients of inputs and of weights together."""
    p = r.parallel
    if p.pp > 1 and r.train.compile and p.schedule in SPLIT_BACKWARD:
        remedy = f"parallel.schedule = {p.schedule} computes gradients of weights separately, which"
        remedy += " compiled halves cannot; set train.compile to false, or parallel.schedule to "
        yield Fault("train.compile", True, f"{remedy}1f1b or interleaved")
