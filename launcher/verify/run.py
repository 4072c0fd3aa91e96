"""`verify`: compares training under layouts with training in one process, at test size."""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import (
    choose_device,
    prepare_rank,
    settle_determinism,
    start_ranks,
)
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import explicit_fields
from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.verify.judgement import Pass, compare_traces, judge
from colonnade.launcher.verify.layouts import (
    DEGREES,
    FIELDS,
    Layout,
    accumulated,
    covering_layouts,
    data_ranks,
    parse_layout,
    with_layout,
    write_layout,
)
from colonnade.launcher.verify.rounding import Noise, measure_noise
from colonnade.launcher.verify.shrink import changed, in_one_process, on_layout, shrink
from colonnade.launcher.verify.trace import Trace, record_trace
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.world import World, open_world

JOB, REPORT = "job.json", "report.json"


@dataclass(frozen=True)
class Job:
    """What the ranks verify.

    Attributes:
        recipe: in full size.
        layouts: those to compare with one process.
        skipped: layouts of the covering set that are not valid, with their faults.
    """

    recipe: Recipe
    layouts: tuple[Layout, ...]
    skipped: tuple[tuple[Layout, str], ...] = ()

    def write(self) -> str:
        """The job as JSON; fields that the recipe does not give are left out."""
        recipe = self.recipe.model_dump(mode="json", exclude_unset=True)
        return json.dumps({"recipe": recipe, "layouts": self.layouts, "skipped": self.skipped})

    @classmethod
    def read(cls, text: str) -> "Job":
        """The job whose JSON `write` returned."""
        values = json.loads(text)
        recipe = Recipe.model_validate(values["recipe"])
        return cls(recipe, tuple(values["layouts"]), tuple(map(tuple, values["skipped"])))


@dataclass(frozen=True)
class Findings:
    """The comparisons of every layout in every precision with one process.

    Attributes:
        job: what was verified.
        small: its recipe at test size.
        ranks: the number of ranks.
        device: the type of their devices.
        passes: the comparisons, one for each layout and precision.
    """

    job: Job
    small: Recipe
    ranks: int
    device: str
    passes: tuple[Pass, ...]


def verify(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int = 1,
    layouts: Sequence[str] = (),
) -> dict[str, Any]:
    """Compares a few steps of a recipe, shrunk to test size, under layouts and in one process.

    Every step starts from the weights of the one process. Where a tensor differs from that process
    by more than its bound, further training in one process measures how far rounding alone moves
    the tensor: this tells whether the difference is rounding or a fault.

    Under torchrun every rank makes the same call, and `nproc` is ignored.

    Args:
        recipe: a recipe, the path of one, or the name of one that is shipped.
        overrides: `table.field=value`, as on the command line.
        nproc: ranks to start on this host.
        layouts: such as `tp=2,dp_shard=2`; by default a set that covers all valid layouts.

    Returns:
        the report, on every rank: `equal`, and for every layout and precision its `verdict`
        (`equal`, `equal up to rounding`, `not equal`), what was compared, the worst tensor of each
        kind, its difference, the allowed difference, and, if measured, how far rounding alone moves
        it.

    Raises:
        UserError: a mistake in the recipe or a layout; RecipeError lists all faults at once.

    Example:
        >>> from colonnade import verify
        >>> verify("quickstart", nproc=4, layouts=["tp=4"])["equal"]  # doctest: +SKIP
        True
    """
    environment = RankEnvironment.from_environment()
    size = environment.size if environment else nproc
    job = plan_job(recipe, overrides, size, layouts)
    if environment is not None:
        return make_report(verify_as_rank(job, environment))
    # a fault that every rank would report is reported once, before ranks start
    train = job.recipe.train
    choose_device(train.device, RankEnvironment.on_one_host(0, nproc), train.compile)
    with tempfile.TemporaryDirectory(prefix="colonnade-verify-") as folder:
        Path(folder, JOB).write_text(job.write(), encoding="utf-8")
        if status := start_ranks(verify_started_rank, {"folder": folder}, nproc):
            raise SystemExit(status)
        return json.loads(Path(folder, REPORT).read_text(encoding="utf-8"))


def verify_started_rank(folder: str) -> None:
    """Takes part as a rank that `verify` started: reads the job from the folder.

    Rank 0 writes the report there.
    """
    environment = RankEnvironment.from_environment()
    assert environment is not None
    job = Job.read(Path(folder, JOB).read_text(encoding="utf-8"))
    findings = verify_as_rank(job, environment)
    if environment.rank == 0:
        Path(folder, REPORT).write_text(json.dumps(make_report(findings)), encoding="utf-8")


# What to verify


def plan_job(
    recipe: Recipe | str | Path, overrides: Sequence[str], size: int, layouts: Sequence[str]
) -> Job:
    """Loads the recipe, and chooses the layouts of `size` ranks to verify.

    Raises:
        UserError: there is nothing to compare, or a mistake in the recipe or a layout.
    """
    chosen = [parse_layout(text) for text in layouts]
    if size == 1 and not chosen:
        raise UserError(
            "verify compares several ranks with one: give --nproc, 2 or more, or a --layout"
        )
    overrides, shared = split_overrides(overrides)
    if not isinstance(recipe, Recipe):
        environment = RankEnvironment.from_environment()
        first = environment is None or environment.rank == 0
        report = partial(print, file=sys.stderr) if first else None
        recipe = load_recipe(recipe, overrides, None, report)
    elif overrides:
        raise UserError("overrides go with a recipe's name or path; change a Recipe by model_copy")
    parallel = ParallelConfig.model_validate(dict(explicit_fields(recipe.parallel)) | shared)
    recipe = recipe.model_copy(update={"parallel": parallel})
    if chosen:
        faults = [f for layout in chosen for f in validate(fitted(recipe, layout, size), size)]
        if faults:
            raise RecipeError(list({str(f): f for f in faults}.values()))
        return Job(recipe, tuple({write_layout(layout): layout for layout in chosen}.values()))
    valid, skipped, m = [], [], recipe.model
    for layout in covering_layouts(size, m.experts if m.has("E", "T") else 0):
        if any(layout.get(name, value) != value for name, value in shared.items()):
            continue
        faults = validate(fitted(recipe, layout, size), size)
        if faults:
            skipped.append((layout, "; ".join(map(str, faults))))
        else:
            valid.append(layout)
    assert valid, "data parallelism alone fits every recipe"
    return Job(recipe, tuple(valid), tuple(skipped))


def fitted(recipe: Recipe, layout: Layout, size: int) -> Recipe:
    """The recipe under a layout, with a batch that fits it: that of the shrunk recipe will."""
    placed = with_layout(recipe, layout)
    rows, ranks = recipe.model.balance_samples, max(1, data_ranks(placed, size))
    count = accumulated(placed)
    batch: dict[str, object] = {"micro_batch": rows, "global_batch": rows * ranks * count}
    train = changed(recipe.train, batch, remove=("ramp_batch", "ramp_steps", "timeline"))
    return placed.model_copy(update={"train": train})


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], Layout]:
    """Splits overrides into those of other tables, and fields of `[parallel]` for all layouts.

    Raises:
        UserError: a degree of parallelism is among them.
    """
    others: list[str] = []
    shared: Layout = {}
    for text in overrides:
        field, _, value = (word.strip() for word in text.partition("="))
        table, _, name = field.partition(".")
        if table != "parallel" or name not in FIELDS:
            others.append(text)
        elif name in DEGREES:
            raise UserError(f"{text}: name layouts as such: --layout {name}={value}")
        else:
            shared |= parse_layout(f"{name}={value}")
    return others, shared


# What every rank does


def verify_as_rank(job: Job, environment: RankEnvironment) -> Findings:
    """Verifies as one rank. Rank 0 trains the reference first, in a group of one process.

    Returns:
        the findings, on every rank.
    """
    train = job.recipe.train
    settle_determinism(train.deterministic)
    device = prepare_rank(environment, train.device, train.compile)
    small = shrink(job.recipe, environment.size, job.layouts)
    exact = train_reference(small) if environment.rank == 0 else Trace()
    with open_world(environment.rank, environment.size, device) as world:
        passes = tuple(compare_layouts(job, small, exact, world))
    return Findings(job, small, environment.size, device.type, passes)


def train_reference(small: Recipe) -> Trace:
    """Trains a shrunk recipe in one process in fp64 on a CPU: the reference of every layout.

    Raises:
        UserError: a loss is not finite, so that there is nothing to compare with.
    """
    with open_world(0, 1, torch.device("cpu")) as world:
        exact = record_trace(in_one_process(small), world)
    for name, loss in exact.losses.items():
        if not loss.isfinite():
            raise UserError(
                f"in one process, at test size, {name} is {float(loss)}: there is nothing to "
                "compare with; try another train.seed"
            )
    return exact


def compare_layouts(job: Job, small: Recipe, exact: Trace, world: World) -> Iterator[Pass]:
    """Trains every layout in every precision of the device, and compares it with the reference.

    Rank 0 broadcasts the parameters of the reference, `exact`, from which every step starts, and
    broadcasts each comparison.
    """
    starts = on_rank_zero(lambda: exact.parameters)
    precisions = ("fp32",) if world.device.type == "cuda" else ("fp64", "fp32")
    for layout in job.layouts:
        for precision in precisions:
            trace = record_trace(on_layout(small, world.size, layout, precision), world, starts)
            name = write_layout(layout)
            yield on_rank_zero(partial(compare_traces, name, precision, trace, exact))


def measure_noise_where_exceeded(findings: Findings) -> dict[str, Noise]:
    """Measures the noise of rounding in one process, in each precision with an exceeded bound."""
    exceeded = sorted({one.precision for one in findings.passes if one.exceeds})
    if not exceeded:
        return {}
    with open_world(0, 1, torch.device("cpu")) as world:
        return {p: measure_noise(findings.small, p, world) for p in exceeded}


def make_report(findings: Findings) -> dict[str, Any]:
    """The report of `verify`; measures the noise of rounding first where a bound was exceeded."""
    judged = judge(findings.passes, measure_noise_where_exceeded(findings))
    return {
        "recipe": findings.job.recipe.name,
        "ranks": findings.ranks,
        "device": findings.device,
        "steps": findings.small.train.steps,
        "equal": all(result["equal"] for result in judged),
        "layouts": judged,
        "skipped": [
            {"layout": write_layout(layout), "why": faults}
            for layout, faults in findings.job.skipped
        ],
    }
