"""`verify`: compares training under layouts with training in one process, at test size."""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import (
    choose_device,
    prepare_rank,
    settle_determinism,
    start_ranks,
)
from colonnade.launcher.cluster.rendezvous import connect
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify.judgement import Pass, compare_traces, judge
from colonnade.launcher.verify.plan import FAMILIES, Job, plan_all, plan_job
from colonnade.launcher.verify.rounding import Noise, measure_noise
from colonnade.launcher.verify.shrink import in_one_process, on_case, shrink
from colonnade.launcher.verify.trace import Trace, record_trace
from colonnade.parallel.world import World, open_world

JOBS, REPORTS = "jobs.json", "reports.json"

References = Mapping[str, Trace]  # of one process, by residual wiring


@dataclass(frozen=True)
class Findings:
    """The comparisons of every case in every precision with one process.

    Attributes:
        job: what was verified.
        small: its recipe at test size.
        ranks: the number of ranks.
        device: the type of their devices.
        passes: the comparisons, one for each case and precision, those of a case one after another.
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
    sample: int | None = None,
    seed: int = 0,
    stage: int | None = None,
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
        layouts: such as `tp=2,dp_shard=2`, which may also name `residual` and `recompute`. By
            default a covering set: every pair of choices, among axes that are on or off and values
            of options, that is possible.
        sample: how many cases of the covering set are drawn; None: all.
        seed: of that draw.
        stage: of a recipe with training stages, the one that is compared.

    Returns:
        the report, on every rank: `equal`, and for every layout and precision its `verdict`
        (`equal`, `equal up to rounding`, `not equal`), what was compared, the worst tensor of each
        kind, its difference, the allowed difference, and, if measured, how far rounding alone moves
        it. Of a covering set also `covering`: how many cases and pairs of choices it has, and which
        pairs are impossible.

    Raises:
        UserError: a mistake in the recipe or a layout; RecipeError lists all faults at once.

    Example:
        >>> from colonnade import verify
        >>> verify("quickstart", nproc=4, layouts=["tp=4"])["equal"]  # doctest: +SKIP
        True
    """
    size = number_of_ranks(nproc)
    (report,) = run_jobs([plan_job(recipe, overrides, size, layouts, sample, seed, stage)], nproc)
    return report


def verify_all(*, nproc: int, sample: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Compares the covering sets of four small recipes with one process: a dense model, a mixture
    of experts, a hybrid, and a hybrid with mixtures, in fp64, with two steps each.

    Ranks are started once. Under torchrun every rank makes the same call.

    Args:
        nproc: ranks to start on this host.
        sample: how many cases of each covering set are drawn; None: all.
        seed: of that draw.

    Returns:
        the report, on every rank: `equal`, and under `recipes` the report of `verify` of each, with
        its `family`.
    """
    reports = run_jobs(plan_all(number_of_ranks(nproc), sample, seed), nproc)
    families = zip(FAMILIES, reports, strict=True)
    return {
        "ranks": reports[0]["ranks"],
        "device": reports[0]["device"],
        "equal": all(report["equal"] for report in reports),
        "processor_seconds": sum(report["processor_seconds"] for report in reports),
        "recipes": [{"family": family, **report} for family, report in families],
    }


def number_of_ranks(nproc: int) -> int:
    """The number of ranks of the job that this process is in, or `nproc`."""
    environment = RankEnvironment.from_environment()
    return environment.size if environment else nproc


def run_jobs(jobs: Sequence[Job], nproc: int) -> list[dict[str, Any]]:
    """Verifies all jobs on the ranks of this job, or on `nproc` that it starts once; returns their
    reports."""
    environment = RankEnvironment.from_environment()
    if environment is not None:
        return list(map(make_report, verify_as_rank(jobs, environment)))
    # a fault that every rank would report is reported once, before ranks start
    train = jobs[0].recipe.train
    choose_device(train.device, RankEnvironment.on_one_host(0, nproc), train.compile)
    with tempfile.TemporaryDirectory(prefix="colonnade-verify-") as folder:
        Path(folder, JOBS).write_text(json.dumps([job.write() for job in jobs]), encoding="utf-8")
        if status := start_ranks(verify_started_rank, {"folder": folder}, nproc):
            raise SystemExit(status)
        return json.loads(Path(folder, REPORTS).read_text(encoding="utf-8"))


def verify_started_rank(folder: str) -> None:
    """Takes part as a rank that `run_jobs` started: reads the jobs from the folder.

    Rank 0 writes the reports there.
    """
    environment = RankEnvironment.from_environment()
    assert environment is not None
    jobs = list(map(Job.read, json.loads(Path(folder, JOBS).read_text(encoding="utf-8"))))
    findings = verify_as_rank(jobs, environment)
    if environment.rank == 0:
        reports = list(map(make_report, findings))
        Path(folder, REPORTS).write_text(json.dumps(reports), encoding="utf-8")


# What every rank does


def verify_as_rank(jobs: Sequence[Job], environment: RankEnvironment) -> list[Findings]:
    """Verifies as one rank. Rank 0 trains the references first, in a group of one process.

    Returns:
        the findings of each job, on every rank.
    """
    train = jobs[0].recipe.train  # all have the same device
    settle_determinism(train.deterministic)
    device = prepare_rank(environment, train.device, train.compile)
    size = environment.size
    smalls = [shrink(job.recipe, size, job.cases, job.steps) for job in jobs]
    both = list(zip(jobs, smalls, strict=True))
    references: list[References] = [{}] * len(jobs)
    if environment.rank == 0:
        with open_world(0, 1, torch.device("cpu")) as world:
            references = [train_references(job, small, world) for job, small in both]
    findings = []
    with open_world(environment.rank, size, device, connect(environment, device)) as world:
        for (job, small), exact in zip(both, references, strict=True):
            passes = tuple(compare_cases(job, small, exact, world, notify=True))
            findings.append(Findings(job, small, size, device.type, passes))
    return findings


def train_references(job: Job, small: Recipe, world: World) -> References:
    """Trains a shrunk recipe in one process in fp64 on a CPU, once with every residual wiring of
    the job's cases.

    Raises:
        UserError: a loss is not finite, so that there is nothing to compare with.
    """
    references = {}
    for residual in residuals_by_name(job).values():
        if residual not in references:
            references[residual] = record_trace(in_one_process(small, residual), world)
    for exact in references.values():
        for name, loss in exact.losses.items():
            if not loss.isfinite():
                raise UserError(
                    f"in one process, at test size, {name} is {float(loss)}: there is nothing to "
                    "compare with; try another train.seed"
                )
    return references


def residual_of(job: Job, index: int) -> str:
    """The residual wiring of a case of a job."""
    return job.cases[index].residual or job.recipe.model.residual


def compare_cases(
    job: Job, small: Recipe, references: References, world: World, notify: bool = False
) -> Iterator[Pass]:
    """Trains every case in every precision of the device, and compares it with its reference.

    Rank 0 broadcasts the parameters of the references, from which every step starts, and broadcasts
    each comparison. With `notify` it prints a line for each.
    """
    starts = on_rank_zero(lambda: {n: exact.parameters for n, exact in references.items()})
    precisions = ("fp32",) if world.device.type == "cuda" else job.precisions
    for index, case in enumerate(job.cases):
        residual = residual_of(job, index)
        for precision in precisions:
            begin = time.process_time()
            try:
                recipe = on_case(small, world.size, case, precision)
                trace = record_trace(recipe, world, starts[residual])
            except Exception as error:
                error.add_note(f"{job.recipe.name} under --layout {case} in {precision}")
                raise
            seconds = sum(on_all_ranks(partial(seconds_since, begin)))
            exact = references.get(residual, Trace())
            compared = partial(compare_traces, str(case), precision, trace, exact)
            one = replace(on_rank_zero(compared), seconds=seconds)
            if notify and world.is_rank_zero:
                count = f"{index + 1}/{len(job.cases)}"
                result = "differs by more than its bound" if one.exceeds else "equal"
                line = f"{job.recipe.name} {count}  {case}  {precision}  {result}"
                print(f"{line}  {seconds:.1f} s of processor time", file=sys.stderr, flush=True)
            yield one
            del recipe, trace, compared
            gc.collect()  # FSDP's cycles hold the model: many cases would fill the memory


def seconds_since(begin: float) -> float:
    """The processor time of this process since `time.process_time()` was `begin`."""
    return time.process_time() - begin


def measure_noise_where_exceeded(findings: Findings) -> dict[tuple[str, str], Noise]:
    """Measures the noise of rounding in one process, by residual wiring and precision, where a
    bound was exceeded."""
    residuals = residuals_by_name(findings.job)
    exceeded = sorted({(residuals[p.layout], p.precision) for p in findings.passes if p.exceeds})
    if not exceeded:
        return {}
    with open_world(0, 1, torch.device("cpu")) as world:
        return {
            (residual, precision): measure_noise(findings.small, precision, world, residual)
            for residual, precision in exceeded
        }


def residuals_by_name(job: Job) -> dict[str, str]:
    """The residual wiring of every case of a job, by the case's name."""
    return {str(case): residual_of(job, index) for index, case in enumerate(job.cases)}


def make_report(findings: Findings) -> dict[str, Any]:
    """The report of `verify`; measures the noise of rounding first where a bound was exceeded."""
    job, measured = findings.job, measure_noise_where_exceeded(findings)
    judged = []
    for name, residual in residuals_by_name(job).items():
        noise = {precision: n for (of, precision), n in measured.items() if of == residual}
        judged += judge([one for one in findings.passes if one.layout == name], noise)
    report = {
        "recipe": job.recipe.name,
        "ranks": findings.ranks,
        "device": findings.device,
        "steps": findings.small.train.steps,
        "equal": all(result["equal"] for result in judged),
        "processor_seconds": sum(result["processor_seconds"] for result in judged),
        "layouts": judged,
    }
    if job.covering is not None:
        report["covering"] = {
            "cases": len(job.covering.cases),
            "pairs": job.covering.pairs,
            "impossible": [one._asdict() for one in job.covering.impossible],
        }
    return report
