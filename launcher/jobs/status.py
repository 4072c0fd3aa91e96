"""`status`: the state of submitted jobs, and how far their runs have come."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.slurm import client
from colonnade.launcher.errors import UserError
from colonnade.launcher.jobs.history import aligned
from colonnade.launcher.jobs.record import is_number, read_record, submitted_runs
from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.run_files import HEARTBEAT, JOB, JOB_SCRIPT, METRICS, RECIPE
from colonnade.launcher.train.events import STARTS, read_events
from colonnade.launcher.train.folder import newest_step, saved_recipe
from colonnade.launcher.train.metrics import read_metrics

COLUMNS = ("job", "state", "reason", "nodes", "step", "loss", "tokens/s", "checkpoint", "restarts")


def status(targets: Sequence[str] = (), runs: str | Path = "runs") -> list[dict[str, Any]]:
    """Returns what is known of jobs and their runs, one dictionary for each job.

    Args:
        targets: numbers of jobs, or folders of runs; none: all that were submitted from `runs`.
        runs: the folder of the runs' folders.

    Raises:
        UserError: there is no such job or run, or SLURM does not answer.
    """
    runs = Path(runs)
    if targets:
        found = [pair for target in targets for pair in jobs_of(target, runs)]
    else:
        found = [pair for run, record in submitted_runs(runs) for pair in record.trained(run)]
    if not found:
        raise UserError(f"{runs}: no run in it was submitted; name a job or a run's folder")
    return [describe(job, run) for job, run in found]


def jobs_of(target: str, runs: Path) -> list[tuple[str, Path | None]]:
    """Returns the jobs that a number or a run's folder means, with the folders of their runs.

    Raises:
        UserError: there is no such job, or the folder was not submitted.
    """
    if not is_number(target):
        record = read_record(Path(target))
        if record is None:
            raise UserError(
                f"{target}: neither the number of a job nor the folder of a run that was submitted "
                f"({JOB} is missing)"
            )
        return list(record.trained(Path(target)))
    if known := client.jobs(target):
        script = Path(known[0].get("Command", ""))
        record = read_record(script.parent) if script.name == JOB_SCRIPT else None
        if record is None or target.partition("_")[0] not in record.jobs:
            return [(client.name_of(one), None) for one in known]
        return of_number(target, record.trained(script.parent))
    found = [pair for run, record in submitted_runs(runs) for pair in record.trained(run)]
    if matching := of_number(target, found):
        return matching
    raise UserError(f"job {target}: SLURM does not know it (any more), and no run in {runs}")


def of_number(target: str, found: Sequence[tuple[str, Path]]) -> list[tuple[str, Path | None]]:
    """Returns those jobs that a number means; that of an array means all of it."""
    return [(job, run) for job, run in found if job == target or job.startswith(f"{target}_")]


def script_of(job: str, run: Path) -> Path:
    """Returns the script of the job that trains a run; the runs of a sweep share one."""
    return (run.parent if "_" in job else run) / JOB_SCRIPT


def facts_of(job: str, run: Path | None) -> dict[str, str]:
    """Returns what SLURM knows of a job; nothing if it does not know it (any more)."""
    known = client.jobs(job) if run is None else client.jobs_of_script(job, script_of(job, run))
    return known[0] if known else {}


def describe(job: str, run: Path | None) -> dict[str, Any]:
    """Returns what SLURM knows of a job, and what the folder of its run tells."""
    record = facts_of(job, run)
    state = client.state_of(record) if record else "ENDED"
    described: dict[str, Any] = {
        "job": job,
        "state": state,
        "reason": named(record.get("Reason")),
        "nodes": named(record.get("NodeList")),
        "requeues": int(record.get("Restarts") or 0),
        "log": record.get("StdOut"),
        "run": None if run is None else str(run),
    }
    return described if run is None else described | progress(run)


def named(value: str | None) -> str | None:
    """Returns a value of scontrol's; None where it prints a word for none."""
    return None if value in (None, "", "None", "(null)") else value


def progress(run: Path) -> dict[str, Any]:
    """Returns how far a run has come, by the files in its folder."""
    events, rows = read_events(run), read_metrics(run / METRICS)
    trained: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    starts = sum(event["event"] in STARTS for event in events)
    stopped: dict[str, Any] = next(
        (e for e in reversed(events) if e["event"] in (*STARTS, "stop")), {}
    )
    steps = training_stages(saved_recipe(run))[-1].stop if (run / RECIPE).is_file() else None
    return {
        "step": trained.get("step", 0),
        "steps": steps,
        "loss": trained.get("loss"),
        "tokens_per_s": trained.get("tokens_per_s"),
        "checkpoint": newest_step(run) or None,
        "restarts": max(0, starts - 1),
        "stopped": stopped.get("reason"),
        "message": stopped.get("message"),
        **heartbeat(run),
    }


def heartbeat(run: Path) -> dict[str, Any]:
    """Returns the phase of a run, and the seconds since it last gave a sign of progress; nothing
    where it has given none."""
    path = run / HEARTBEAT
    try:
        beat, moment = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
    except FileNotFoundError:
        return {}
    return {"phase": beat["phase"], "silent_seconds": round(max(0.0, time.time() - moment), 1)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the jobs as a table, with the folder of each run below it."""
    cells = [(*COLUMNS, "run")]
    for row in rows:
        steps = f"/{row['steps']}" if row.get("steps") else ""
        loss, rate = row.get("loss"), row.get("tokens_per_s")
        reason = row["reason"] or row.get("message") or row.get("stopped") or "-"
        if row["state"] == "RUNNING" and "phase" in row:
            reason = f"{row['phase']}, {row['silent_seconds']:.0f} s ago"
        cells.append(
            (
                row["job"],
                row["state"],
                reason,
                row["nodes"] or "-",
                f"{row['step']}{steps}" if "step" in row else "-",
                "-" if loss is None else f"{loss:.4f}",
                "-" if rate is None else f"{rate:,.0f}",
                str(row.get("checkpoint") or "-"),
                str(row.get("restarts", "-")),
                row["run"] or "-",
            )
        )
    return aligned(cells)
