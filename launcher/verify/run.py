"""The verb `verify`: a recipe at test size under layouts, beside the same in one process."""

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
from colonnade.launcher.cluster.doctor import check_compiling
from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import (
    choose_device,
    settle_determinism,
    settle_memory,
    settle_threads,
    start_ranks,
)
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import explicit_fields
from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.verify.judgement import Pass, beside, judge
from colonnade.launcher.verify.layouts import (
    DEGREES,
    FIELDS,
    Layout,
    covering,
    laid_out,
    parse_layout,
    write_layout,
)
from colonnade.launcher.verify.rounding import Noise, noise
from colonnade.launcher.verify.shrink import alone, on_layout, shrink
from colonnade.launcher.verify.trace import Trace, traced
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.world import World, world

JOB, REPORT = "job.json", "report.json"


@dataclass(frozen=True)
class Job:
    """What ranks are to verify: the recipe in full size, the layouts, and those left out."""

    recipe: Recipe
    layouts: tuple[Layout, ...]
    skipped: tuple[tuple[Layout, str], ...] = ()

    def write(self) -> str:
        """As JSON; a field of the recipe that was not given stays so."""
        recipe = self.recipe.model_dump(mode="json", exclude_unset=True)
        return json.dumps({"recipe": recipe, "layouts": self.layouts, "skipped": self.skipped})

    @classmethod
    def read(cls, text: str) -> "Job":
        """From what `write` made."""
        read = json.loads(text)
        recipe = Recipe.model_validate(read["recipe"])
        return cls(recipe, tuple(read["layouts"]), tuple(map(tuple, read["skipped"])))


@dataclass(frozen=True)
class Findings:
    """What ranks found: every layout in every precision, beside one process."""

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
    """Compare a few steps of a recipe, shrunk to test size, under layouts and in one process.

    Every step starts from the one process's weights. Where a tensor is farther from it than its
    bound, one process shows how far rounding alone moves that tensor, and so which of both it is.

    Under torchrun every rank calls this alike and `nproc` is ignored.

    Args:
        recipe: a recipe, the path of one, or the name of one that is shipped.
        overrides: `table.field=value`, as on the command line.
        nproc: ranks to start on this host.
        layouts: such as `tp=2,dp_shard=2`; by default a set that covers all valid ones.

    Returns:
        the report, on every rank: `equal`, and for every layout and precision its `verdict`
        (`equal`, `equal up to rounding`, `not equal`), what was compared, the worst tensor of each
        kind, its difference, how large it may be, and how far rounding alone moves it if that was
        measured.

    Raises:
        UserError: a mistake in the recipe or a layout; RecipeError lists all faults at once.

    Example:
        >>> from colonnade import verify
        >>> verify("quickstart", nproc=4, layouts=["tp=4"])["equal"]  # doctest: +SKIP
        True
    """
    place = RankEnvironment.from_environment()
    size = place.size if place else nproc
    job = planned(recipe, overrides, size, layouts)
    if place is not None:
        return reported(be_rank(job, place))
    device = choose_device(job.recipe.train.device, RankEnvironment(0, nproc, 0, nproc))
    check_compiling(job.recipe.train.compile, device)
    with tempfile.TemporaryDirectory(prefix="colonnade-verify-") as folder:
        Path(folder, JOB).write_text(job.write(), encoding="utf-8")
        if status := start_ranks(["_verify", folder], nproc):
            raise SystemExit(status)
        return json.loads(Path(folder, REPORT).read_text(encoding="utf-8"))


def be_started_rank(folder: Path) -> None:
    """A rank that `verify` started: the job lies in the folder, and the report goes there."""
    place = RankEnvironment.from_environment()
    assert place is not None
    found = be_rank(Job.read((folder / JOB).read_text(encoding="utf-8")), place)
    if place.rank == 0:
        (folder / REPORT).write_text(json.dumps(reported(found)), encoding="utf-8")


# What to verify


def planned(
    recipe: Recipe | str | Path, overrides: Sequence[str], size: int, layouts: Sequence[str]
) -> Job:
    """A valid recipe and layouts that `size` ranks can take.

    Raises:
        UserError: there is nothing to compare, or a mistake.
    """
    chosen = [parse_layout(text) for text in layouts]
    if size == 1 and not chosen:
        raise UserError(
            "verify compares several ranks with one: give --nproc, 2 or more, or a --layout"
        )
    overrides, shared = separated(overrides)
    if not isinstance(recipe, Recipe):
        place = RankEnvironment.from_environment()
        tell = partial(print, file=sys.stderr) if place is None or place.rank == 0 else None
        recipe = load_recipe(recipe, overrides, None, tell)
    elif overrides:
        raise UserError("overrides go with a recipe's name or path; change a Recipe by model_copy")
    parallel = ParallelConfig.model_validate(dict(explicit_fields(recipe.parallel)) | shared)
    recipe = recipe.model_copy(update={"parallel": parallel})
    if chosen:
        faults = [f for layout in chosen for f in validate(laid_out(recipe, layout), size)]
        if faults:
            raise RecipeError(list({str(f): f for f in faults}.values()))
        return Job(recipe, tuple({write_layout(layout): layout for layout in chosen}.values()))
    fitting, skipped = [], []
    for layout in covering(size):
        if any(layout.get(name, value) != value for name, value in shared.items()):
            continue
        faults = validate(laid_out(recipe, layout), size)
        if faults:
            skipped.append((layout, "; ".join(map(str, faults))))
        else:
            fitting.append(layout)
    if not fitting:
        raise UserError("\n".join([f"no layout of {size} ranks is valid:", *reasons(skipped)]))
    return Job(recipe, tuple(fitting), tuple(skipped))


def separated(overrides: Sequence[str]) -> tuple[list[str], Layout]:
    """Overrides of other tables, and the fields of `[parallel]` that hold for all layouts.

    Raises:
        UserError: a degree among them.
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


def reasons(skipped: Sequence[tuple[Layout, str]]) -> list[str]:
    """A line per layout that was left out."""
    return [f"  {write_layout(layout)}: {why}" for layout, why in skipped]


# What every rank does


def be_rank(job: Job, place: RankEnvironment) -> Findings:
    """Take part as one rank; rank 0 first trains alone, and compares. Returns what it found."""
    settle_threads(place)
    settle_determinism(job.recipe.train.deterministic)
    device = choose_device(job.recipe.train.device, place)
    check_compiling(job.recipe.train.compile, device)
    settle_memory(device)
    small = shrink(job.recipe, place.size, job.layouts)
    exact = reference(small) if place.rank == 0 else Trace()
    with world(place.rank, place.size, device) as here:
        passes = tuple(compared(job, small, exact, here))
    return Findings(job, small, place.size, device.type, passes)


def reference(small: Recipe) -> Trace:
    """What one process in fp64 on a CPU leaves behind: the reference of every layout.

    Raises:
        UserError: it is not finite, so that there is nothing to compare with.
    """
    with world(0, 1, torch.device("cpu")) as here:
        exact = traced(alone(small), here)
    for name, loss in exact.losses.items():
        if not loss.isfinite():
            raise UserError(
                f"in one process, at test size, {name} is {float(loss)}: there is nothing to "
                "compare with; try another train.seed"
            )
    return exact


def compared(job: Job, small: Recipe, exact: Trace, here: World) -> Iterator[Pass]:
    """Every layout in every precision that the device has, beside the reference. Collective.

    Every step starts from the reference's weights.
    """
    starts = on_rank_zero(lambda: exact.parameters)
    precisions = ("fp32",) if here.device.type == "cuda" else ("fp64", "fp32")
    for layout in job.layouts:
        for precision in precisions:
            trace = traced(on_layout(small, here.size, layout, precision), here, starts)
            yield on_rank_zero(partial(beside, write_layout(layout), precision, trace, exact))


def measured(found: Findings) -> dict[str, Noise]:
    """What rounding alone does, in each precision in which a bound was exceeded."""
    exceeded = sorted({one.precision for one in found.passes if one.exceeds})
    if not exceeded:
        return {}
    with world(0, 1, torch.device("cpu")) as here:
        return {precision: noise(found.small, precision, here) for precision in exceeded}


def reported(found: Findings) -> dict[str, Any]:
    """The report; where a bound was exceeded, this process first measures what rounding does."""
    judged = judge(found.passes, measured(found))
    return {
        "recipe": found.job.recipe.name,
        "ranks": found.ranks,
        "device": found.device,
        "steps": found.small.train.steps,
        "equal": all(result["equal"] for result in judged),
        "layouts": judged,
        "skipped": [
            {"layout": write_layout(layout), "why": why} for layout, why in found.job.skipped
        ],
    }
