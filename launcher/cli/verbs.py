"""What each verb of the command line does with its parsed arguments; returns the exit status."""

import argparse
import importlib
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from colonnade.launcher.cli.report import write_text
from colonnade.launcher.cluster.environment import RankEnvironment, report_failure
from colonnade.launcher.errors import UserError
from colonnade.launcher.run_files import RECIPE

OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")  # the begin of `table.field=value`


def benchmarks() -> Any:
    """Imports the package of benchmarks by name, because it imports the launcher itself."""
    return importlib.import_module("colonnade.bench")


def run_train(arguments: argparse.Namespace) -> int:
    """Runs `colonnade train`; returns the exit status."""
    from colonnade.launcher.train.run import describe, resume, train

    a, overrides = arguments, list(arguments.overrides)
    automatic = a.resume == "auto"
    order: dict[str, Any] = {"nproc": a.nproc, "until": a.until, "automatic": automatic}
    order["restarts"] = a.restarts
    if a.run and a.recipe and "=" in a.recipe:  # the first override, of the run's own recipe
        overrides.insert(0, a.recipe)
        a.recipe = None
    continued = a.run if a.recipe is None else None
    if a.resume is not None and not automatic:
        unused = [name for name in ("dry_run", "runs", "run") if getattr(a, name)]
        if unused:
            options = " ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise UserError(f"train --resume continues in the run's folder: leave out {options}")
        continued = a.resume
        if a.recipe:
            overrides.insert(0, a.recipe)
    if automatic and not a.run:
        raise UserError("train --resume auto needs a run to choose from: add --run DIR")
    if a.run and a.runs:
        raise UserError("--run names the run's folder, and --runs one for new runs: leave one out")
    if continued is not None and a.dry_run:
        a.report(describe(Path(continued) / RECIPE, overrides, nproc=a.nproc))
        return 0
    if continued is not None:
        run = resume(continued, overrides, **order)
    elif a.recipe is None:
        raise UserError("train: name a recipe (for example: quickstart), or --resume RUN")
    elif a.dry_run:
        a.report(describe(a.recipe, overrides, nproc=a.nproc))
        return 0
    else:
        run = train(a.recipe, overrides, runs=a.runs or "runs", run=a.run, **order)
    if is_rank_zero() and a.json:
        a.report(run.summary())
    return run.status


def run_rank(arguments: argparse.Namespace) -> int:
    """The hidden verb of the ranks that `start_ranks` starts."""
    from colonnade.launcher.cluster.ranks import run_as_rank

    run_as_rank(arguments.function, arguments.arguments)
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    """Runs `colonnade generate`; returns the exit status."""
    from colonnade.launcher.generate.prompts import read_prompts
    from colonnade.launcher.generate.run import Order, run

    a = arguments
    prompts = [a.prompt] if a.prompts is None else read_prompts(a.prompts)
    names = ("temperature", "top_k", "top_p", "seed")
    sampling = {name: getattr(a, name) for name in names}
    order = Order(a.model, prompts, a.tokens, sampling, a.batch, tuple(a.overrides))
    return run(order, a.nproc, a.json_lines, streaming=a.prompts is None)


def run_eval(arguments: argparse.Namespace) -> int:
    """Runs `colonnade eval`; returns the exit status."""
    from colonnade.launcher.evaluate.run import evaluate, table

    a = arguments
    overrides = [word for word in a.overrides if OVERRIDE.match(word)]
    data = [word for word in a.overrides if not OVERRIDE.match(word)]
    if a.tasks is not None:
        return run_tasks(a, data, overrides)
    for option in ("include_path", "limit"):
        if getattr(a, option) is not None:
            raise UserError(f"eval --{option.replace('_', '-')} is for --tasks: leave it out")
    report = evaluate(
        a.model,
        data,
        column=a.column or "text",
        prompt=a.prompt,
        format=a.format,
        batch=a.batch,
        seq_len=a.seq_len,
        rows=a.rows,
        overrides=overrides,
        nproc=a.nproc,
    )
    if is_rank_zero():
        print(table(report)) if a.json is None else a.report(report)
    return 0


def run_tasks(arguments: argparse.Namespace, data: list[str], overrides: list[str]) -> int:
    """Runs `colonnade eval --tasks`; returns the exit status."""
    from colonnade.launcher.evaluate.tasks import Order, evaluate_tasks, names, table

    a = arguments
    of_data = {"--rows": a.rows, "--prompt": a.prompt, "--format": a.format, "--column": a.column}
    unused = [*map(repr, data), *(option for option, value in of_data.items() if value is not None)]
    if unused:
        raise UserError(f"eval --tasks brings its own data: leave out {unused[0]}")
    if not names(a.tasks):
        raise UserError("eval --tasks: name one or several, with commas between them")
    if a.seq_len is not None:
        overrides = [*overrides, f"train.seq_len={a.seq_len}"]
    order = Order(a.model, list(names(a.tasks)), a.include_path, a.batch, a.limit, tuple(overrides))
    report = evaluate_tasks(order, a.nproc)
    if is_rank_zero():
        print(table(report)) if a.json is None else a.report(report)
    return 0


def run_data(arguments: argparse.Namespace) -> int:
    """Runs `colonnade data`; returns the exit status."""
    from colonnade.launcher.data import data

    a = arguments
    summary = data(
        a.source,
        a.destination,
        format=a.format,
        tokenizer=a.tokenizer,
        column=a.column,
        prompt=a.prompt,
        eod=a.eod,
        bos=a.bos,
        special_tokens=a.special_tokens,
        overwrite=a.overwrite,
    )
    a.report(asdict(summary))
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Runs `colonnade verify`; returns the exit status, 1 if the runs differ."""
    from colonnade.launcher.verify.matrix import matrix
    from colonnade.launcher.verify.run import verify, verify_all
    from colonnade.launcher.verify.table import table, table_of_all

    a = arguments
    chosen = {"nproc": a.nproc, "sample": a.sample, "seed": a.seed}
    if a.all and (a.recipe or a.layout or a.stage is not None):
        raise UserError("verify --all has recipes and layouts of its own: leave out yours")
    if not a.all and (a.recipe is None or a.table):
        raise UserError(
            "--table is made of all families: verify --all"
            if a.table
            else "verify: name a recipe (for example: quickstart), or --all"
        )
    if a.all:
        report, text = verify_all(**chosen), table_of_all
    else:
        report = verify(a.recipe, list(a.overrides), layouts=a.layout, stage=a.stage, **chosen)
        text = table
    if is_rank_zero():
        if a.table:
            write_text("--table", a.table, matrix(report))
        print(text(report)) if a.json is None else a.report(report)
    return 0 if report["equal"] else 1


def run_plan(arguments: argparse.Namespace) -> int:
    """Runs `colonnade plan`; returns the exit status."""
    from colonnade.launcher.plan.run import plan
    from colonnade.launcher.plan.table import table

    a = arguments
    report = plan(
        a.recipe,
        list(a.overrides),
        gpus=a.gpus,
        dry_run=a.dry_run,
        device=a.device,
        host_memory=a.host_memory,
        stage=a.stage,
    )
    print(table(report)) if a.json is None else a.report(report)
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """Runs `colonnade doctor`; returns the exit status, 1 if something is wrong in the cluster."""
    from colonnade.launcher.cluster.doctor import doctor

    a = arguments
    if a.cluster:
        return run_cluster_doctor(a)
    for option in ("nproc", "picture"):
        if getattr(a, option) is not None:
            raise UserError(f"doctor --{option} is for --cluster: add it, or leave --{option} out")
    a.report(doctor())
    return 0


def run_cluster_doctor(arguments: argparse.Namespace) -> int:
    """Runs `colonnade doctor --cluster`; returns the exit status, 1 if something is wrong."""
    from colonnade.launcher.cluster.fabric.picture import check_picture, draw
    from colonnade.launcher.cluster.fabric.run import Output, cluster_doctor
    from colonnade.launcher.cluster.fabric.table import table

    a = arguments

    def show(report: dict[str, Any]) -> None:
        print(table(report), flush=True) if a.json is None else a.report(report)
        draw(report, a.picture)

    report = cluster_doctor(a.nproc or 1, Output(partial(check_picture, a.picture), show))
    return 1 if report["faults"] else 0


def run_bench(arguments: argparse.Namespace) -> int:
    """Runs `colonnade bench`; returns the exit status."""
    arguments.report(benchmarks().bench(arguments.name, arguments.nproc))
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Runs `colonnade convert`; returns the exit status, 1 if logits differ."""
    from colonnade.launcher.weights.convert import convert
    from colonnade.launcher.weights.logits import LogitsDifferError

    a = arguments
    try:
        report = convert(a.source, a.destination, a.to, a.dtype, a.family, a.edit)
    except LogitsDifferError as error:
        report_failure(str(error), quiet=False)
        return 1
    a.report(asdict(report))
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Runs `colonnade inspect`; returns the exit status, 1 if a file is damaged or two differ."""
    from colonnade.launcher.inspect.run import inspect
    from colonnade.launcher.inspect.table import difference_table, table

    a = arguments
    report = inspect(a.checkpoint, a.other)
    text = table if a.other is None else difference_table
    print(text(report)) if a.json is None else a.report(report)
    return 0 if report["whole"] and report.get("equal", True) else 1


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or was started without a launcher of ranks."""
    rank_env = RankEnvironment.from_environment()
    return rank_env is None or rank_env.rank == 0
