"""The verbs of SLURM's jobs: `submit`, `status`, `logs`, and the hidden ones of their scripts."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colonnade.launcher.errors import UserError

AFTER, ORDER = "_after", "_order"  # the scripts of jobs call them
Integer = Callable[[str], int]
# Options of submit that are fields of a job's options, and what --help says of them.
FIELDS = {
    "account": "to charge",
    "partition": "of the cluster",
    "qos": "quality of service",
    "time": "limit of the job, as sbatch takes it: minutes, H:MM:SS or D-H",
    "name": "of the job (default: the name of the run's folder)",
    "mem": "memory of a node, such as 64G",
    "container": "an image: a file .sif or a folder for Apptainer, else a name for Pyxis",
}
COUNTS = {
    "gpus_per_node": "to ask for; each has a rank",
    "min_nodes": "template elastic: SLURM may start the job with so few",
    "max_restarts": "template elastic: inside the allocation (default: 3)",
    "at_once": "template sweep: how many of its jobs run at once (default: all)",
    "signal_before": "seconds before the time limit at which the run saves (default: 120)",
    "max_failures": "starts in a row that fail and get no further, before it stops (default: 3)",
}


def add_submit(verb: argparse.ArgumentParser, positive: Integer) -> None:
    """Adds the options of `submit`."""
    verb.epilog = (
        "Templates: preemptible (saves when its time ends or SLURM wants its nodes, and starts "
        "again by itself), single (does not), elastic (goes on inside the allocation on the nodes "
        "that are left), chain (jobs one after the other), sweep (an array of runs). To edit one: "
        "submit --dry-run > job.sbatch, or --template PATH of your own."
    )
    verb.add_argument("recipe", help="a path, or the name of a shipped recipe")
    verb.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. train.steps=20")
    verb.add_argument("--nodes", type=positive, required=True, metavar="N")
    verb.add_argument(
        "--ranks-per-node", type=positive, metavar="N", help="(default: one for each GPU, or 1)"
    )
    verb.add_argument(
        "--cpus-per-task", dest="cpus_per_rank", type=positive, metavar="N", help="of each rank"
    )
    verb.add_argument("--template", default="preemptible", help="name or path (%(default)s)")
    verb.add_argument(
        "--run", metavar="DIR", help="the run's folder, new or to go on with (runs/NAME-TIME)"
    )
    for name, text in FIELDS.items():
        verb.add_argument(f"--{name}", help=text)
    for name, text in COUNTS.items():
        verb.add_argument(f"--{name.replace('_', '-')}", type=positive, metavar="N", help=text)
    verb.add_argument("--jobs", type=positive, help="template chain: how many (default: 2)")
    verb.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=V,V,…",
        help="template sweep: values of a field; of several fields every combination is trained",
    )
    verb.add_argument("--module", dest="modules", action="append", metavar="M", help="to load")
    verb.add_argument(
        "--line",
        dest="lines",
        action="append",
        metavar="TEXT",
        help="of shell, before the training, such as 'export NCCL_DEBUG=WARN'",
    )
    verb.add_argument(
        "--sbatch",
        action="append",
        metavar="OPTION",
        help="a further option, such as --sbatch=--constraint=a100",
    )
    verb.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    add_json(verb)


def add_status(verb: argparse.ArgumentParser) -> None:
    """Adds the options of `status`."""
    verb.add_argument(
        "targets", nargs="*", metavar="JOB | RUN", help="(default: all that runs/ has)"
    )
    verb.add_argument("--runs", default="runs", help="folder of the run folders (default: runs)")
    add_json(verb)


def add_logs(verb: argparse.ArgumentParser, count: Integer) -> None:
    """Adds the options of `logs`."""
    verb.add_argument("target", metavar="JOB | RUN")
    verb.add_argument("--follow", action="store_true", help="until the job ends, over requeues")
    verb.add_argument("--lines", type=count, default=50, help="that are written (default: 50)")
    verb.add_argument("--runs", default="runs", help="folder of the run folders (default: runs)")


def add_json(verb: argparse.ArgumentParser) -> None:
    """Adds the option --json."""
    verb.add_argument("--json", metavar="FILE", help="write the report as JSON; `-` is stdout")


def add_hidden(add: Callable[[str], argparse.ArgumentParser]) -> None:
    """Adds the verbs that scripts of jobs call."""
    after = add(AFTER)
    after.set_defaults(action=run_after)
    after.add_argument("run", type=Path)
    after.add_argument("status", nargs="?", type=int, help="of the training")
    after.add_argument("--job", required=True, help="its number")
    after.add_argument("--facts", default="", help="what scontrol prints of the job")
    after.add_argument("--since", type=float, default=0.0, help="when it was submitted")
    after.add_argument("--max-failures", type=int, default=3)
    order = add(ORDER)
    order.set_defaults(action=run_order)
    order.add_argument("--ranks-per-node", type=int, default=1)


def run_submit(arguments: argparse.Namespace) -> int:
    """Runs `colonnade submit`; returns the exit status."""
    from colonnade.launcher.jobs.submit import submit

    a = arguments
    names = (*FIELDS, *COUNTS, "cpus_per_rank", "modules", "lines", "sbatch")
    report = submit(
        a.recipe,
        list(a.overrides),
        nodes=a.nodes,
        ranks_per_node=a.ranks_per_node,
        template=a.template,
        run=a.run,
        sweep=a.sweep,
        jobs=a.jobs,
        dry_run=a.dry_run,
        **{name: getattr(a, name) for name in names},
    )
    if a.json is not None:
        a.report(report)
    elif a.dry_run:
        print(report["script"], end="")
    else:
        print(instructions(report, a.template))
    return 0


def instructions(report: dict[str, Any], template: str) -> str:
    """Returns how to watch, stop and resume what was submitted."""
    jobs, run = report["jobs"], shlex.quote(report["run"])
    all_jobs, first = " ".join(jobs), jobs[0]
    log = f"{first}_0" if template == "sweep" else first
    stop = f"scancel --signal=USR1 {all_jobs}"
    if template in ("preemptible", "elastic", "sweep"):
        stop = f"scontrol update JobId={first} Requeue=0 && {stop}"
    lines = {
        "job": f"{all_jobs} ({template})",
        "run": report["run"],
        "script": report["script"],
        "watch": f"colonnade status {run}; colonnade logs {log} --follow",
        "stop": f"{stop}   (saved; `scancel {all_jobs}` leaves it KillWait to save)",
        "resume": f"the same submit with --run {run}",
    }
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


def run_status(arguments: argparse.Namespace) -> int:
    """Runs `colonnade status`; returns the exit status."""
    from colonnade.launcher.jobs.status import status, table

    rows = status(arguments.targets, arguments.runs)
    print(table(rows)) if arguments.json is None else arguments.report({"jobs": rows})
    return 0


def run_logs(arguments: argparse.Namespace) -> int:
    """Runs `colonnade logs`; returns the exit status."""
    from colonnade.launcher.jobs.logs import logs

    a = arguments
    for text in logs(a.target, lines=a.lines, follow=a.follow, runs=a.runs):
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
    return 0


def run_after(arguments: argparse.Namespace) -> int:
    """The hidden verb by which a job's script decides what follows: prints one word."""
    from colonnade.launcher.jobs.after import after

    a = arguments
    print(
        after(a.run, a.status, job=a.job, facts=a.facts, since=a.since, max_failures=a.max_failures)
    )
    return 0


def run_order(arguments: argparse.Namespace) -> int:
    """The hidden verb that prints the host of each task, on a line, in the order of racks; nothing
    where that is SLURM's own order."""
    from colonnade.launcher.cluster.environment import job_nodes
    from colonnade.launcher.cluster.slurm import client
    from colonnade.launcher.cluster.slurm.nodes import rack_order

    nodes = job_nodes()
    if nodes is None:
        raise UserError(f"{ORDER}: SLURM_JOB_NODELIST is not set; only a job's script calls it")
    hosts = client.hostnames(nodes)
    ordered = rack_order(hosts, client.call("scontrol", "show", "topology"), client.hostnames)
    if ordered != hosts:
        print("\n".join(host for host in ordered for _ in range(arguments.ranks_per_node)))
    return 0
