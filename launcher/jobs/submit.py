"""`submit`: checks a recipe at the size of a job, and submits a script that trains it to SLURM."""

import itertools
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.slurm import client
from colonnade.launcher.cluster.slurm.options import JobOptions, check_options
from colonnade.launcher.cluster.slurm.script import render, template_names
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.jobs.record import JobRecord, read_record
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import JOB_SCRIPT, RECIPE
from colonnade.launcher.train.folder import check_new_or_run, newest_step, saved_recipe
from colonnade.launcher.train.lines import write_below
from colonnade.launcher.train.resumable import check_resumable
from colonnade.launcher.train.run import valid_recipe

DEFAULT = "preemptible"
CHAINED = 2  # jobs of a chain
# Options that some of the templates use; a template of the user may use any.
USED_BY = {
    "min_nodes": ("elastic",),
    "max_restarts": ("elastic",),
    "jobs": ("chain",),
    "sweep": ("sweep",),
    "at_once": ("sweep",),
    "max_failures": ("chain", "elastic", "preemptible", "sweep"),
}


def submit(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    nodes: int,
    ranks_per_node: int | None = None,
    template: str = DEFAULT,
    run: str | Path | None = None,
    sweep: Sequence[str] = (),
    jobs: int | None = None,
    dry_run: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Submits a run to SLURM. The script is written into the run's folder, and may be read there.

    Args:
        recipe: the path of a recipe, or the name of one that is shipped.
        overrides: `table.field=value`, as on the command line.
        nodes: of the job.
        ranks_per_node: ranks of every node; None: one for each GPU that is asked for, or one.
        template: the name of a script's template, or the path of the user's own.
        run: the run's folder; None: a new one, `runs/NAME-TIME`.
        sweep: of the template `sweep`: each is `table.field=value,value,…`; every combination of
            the values is trained.
        jobs: of the template `chain`: how many jobs follow each other.
        dry_run: render the script, and write and submit nothing.
        options: fields of `JobOptions`; those that are None have their defaults.

    Returns:
        the numbers of the jobs, the run's folder and the script: its path, or with `dry_run` its
        text.

    Raises:
        UserError: a mistake in the recipe or the options, or SLURM refuses the job.
    """
    given = {name: value for name, value in options.items() if value is not None}
    check_used(template, {**given, "sweep": sweep or None, "jobs": jobs})
    points = list(points_of(sweep))
    if template == "sweep" and not points:
        raise UserError("--template sweep: name what it varies, as --sweep optimizer.lr=1e-3,3e-3")
    ranks_per_node = ranks_per_node or given.get("gpus_per_node") or 1
    name = Path(recipe).stem
    folder = Path(run or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    for place, fields in zip(run_folders(folder, points), points or [[]], strict=True):
        checked = check_recipe(recipe, [*overrides, *fields], nodes, ranks_per_node, place)
    smallest = 1
    if template == "elastic":
        smallest = smallest_size(recipe, overrides, given, nodes, ranks_per_node, folder)
    job = JobOptions(
        **{"name": folder.name} | given,
        recipe=str(Path(recipe).absolute()) if Path(recipe).is_file() else str(recipe),
        overrides=overrides,
        run=folder,
        folder=Path.cwd(),
        python=sys.executable,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        smallest=smallest,
        points=points,
        since=math.floor(time.time()),
    )
    check_options(job)
    note_layout(checked, ranks_per_node)
    script = render(template, job)
    if dry_run:
        return {"jobs": [], "run": str(folder), "script": script}
    count = jobs or (CHAINED if template == "chain" else 1)
    return send(script, job, template, count)


def send(script: str, job: JobOptions, template: str, count: int) -> dict[str, Any]:
    """Writes a script into the run's folder, submits it `count` times, and records the jobs."""
    run, path = job.run, job.run / JOB_SCRIPT
    check_not_queued(run)
    for folder in run_folders(run, job.points):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot make the run's folder: {error.strerror}") from error
        check_new_or_run(folder)
    write_below(run, lambda: path.write_text(script, encoding="utf-8"))
    numbers: list[str] = []
    try:
        for _ in range(count):
            numbers.append(client.submit(str(path)))
    finally:
        if numbers:
            points = [list(point) for point in job.points]
            ranks = job.nodes * job.ranks_per_node
            record = JobRecord(numbers, template, job.since, job.nodes, ranks, points)
            write_below(run, lambda: record.write(run))
    return {"jobs": numbers, "run": str(run), "script": str(path)}


def run_folders(run: Path, points: Sequence[Sequence[str]]) -> list[Path]:
    """Returns the folders of the runs that a job trains: of a sweep one for each point."""
    return [run / str(index) for index in range(len(points))] or [run]


def check_used(template: str, options: dict[str, Any]) -> None:
    """Refuses options that a template does not use."""
    if template not in template_names():
        return
    for name, templates in USED_BY.items():
        if options.get(name) is not None and template not in templates:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect on the template {template}, but on "
                f"{', '.join(templates)}: leave it out, or name another --template"
            )


def points_of(sweep: Sequence[str]) -> Iterator[list[str]]:
    """Yields the overrides of each run of a sweep: every combination of the values; none without
    `sweep`."""
    if not sweep:
        return
    axes = []
    for text in sweep:
        field, equals, values = text.partition("=")
        if not equals or not field or not values:
            raise UserError(f"--sweep {text}: give a field and its values, as optimizer.lr=1,2,3")
        axes.append([f"{field}={value}" for value in split_values(values)])
    yield from map(list, itertools.product(*axes))


def split_values(text: str) -> list[str]:
    """Splits values at commas, but for those within brackets or quotation marks."""
    return re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", text)


def check_recipe(
    recipe: str | Path, overrides: Sequence[str], nodes: int, ranks_per_node: int, run: Path
) -> Recipe:
    """Loads a recipe and checks it at the size of a job, and against the run that it goes on with.

    Raises:
        UserError: a mistake in the recipe, it does not fit so many ranks, or the run in the folder
            is one of another model, other data or another optimizer.
    """
    ranks, step = nodes * ranks_per_node, newest_step(run)
    try:
        checked = valid_recipe(recipe, overrides, None, ranks, step)
    except RecipeError as error:
        size = f"{nodes} nodes of {ranks_per_node} ranks are {ranks} ranks"
        print(f"colonnade: {size}", file=sys.stderr)
        raise error
    if checked.checkpoint.usr1 == "save":
        raise UserError(
            "checkpoint.usr1 = 'save': SLURM's notice of the end is SIGUSR1, which has to stop the "
            "run; leave the field out"
        )
    if step and (run / RECIPE).is_file():
        check_resumable(saved_recipe(run), checked, step)
    return checked


def smallest_size(
    recipe: str | Path,
    overrides: Sequence[str],
    options: dict[str, Any],
    nodes: int,
    ranks_per_node: int,
    run: Path,
) -> int:
    """Returns the smallest number of nodes on which an elastic job may train a recipe: the given
    one, or the smallest from which on every number is valid."""
    if (given := options.get("min_nodes")) is not None:
        for count in range(given, nodes):
            check_recipe(recipe, overrides, count, ranks_per_node, run)
        return given

    def fits(count: int) -> bool:
        try:
            valid_recipe(recipe, overrides, None, count * ranks_per_node, newest_step(run))
        except RecipeError:
            return False
        return True

    unfit = next((count for count in range(nodes - 1, 0, -1) if not fits(count)), 0)
    if unfit:
        print(
            f"colonnade: the recipe does not fit {unfit} nodes: the job needs {unfit + 1} of "
            f"{nodes}; with parallel.elastic = true it fits more numbers",
            file=sys.stderr,
        )
    return unfit + 1


def note_layout(recipe: Recipe, ranks_per_node: int) -> None:
    """Says on stderr where tensor parallelism would leave a node."""
    tp = recipe.parallel.tp
    if ranks_per_node % tp:
        print(
            f"colonnade: parallel.tp = {tp} spans nodes of {ranks_per_node} ranks, whose network "
            "limits every layer; a divisor of the ranks of a node stays inside",
            file=sys.stderr,
        )


def check_not_queued(run: Path) -> None:
    """Refuses a run that a job trains, or waits to train."""
    record = read_record(run)
    for job in record.jobs if record else []:
        known = client.jobs_of_script(job, run / JOB_SCRIPT)
        if known and not client.has_ended(known):
            state = client.state_of(known[0])
            raise UserError(
                f"{run}: job {job} trains this run, and is {state}; wait for its end, or scancel "
                f"{job}"
            )
