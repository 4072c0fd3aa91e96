"""The command line: `colonnade VERB`. Exits 0 on success, 2 on a user's mistake, 1 otherwise."""

import argparse
import difflib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.environment import USER_MISTAKE, RankEnvironment, report_failure
from colonnade.launcher.console import tolerate_closed_streams
from colonnade.launcher.errors import UserError


def benchmarks() -> Any:
    """Imports the package of benchmarks by name, because it imports the launcher itself."""
    return importlib.import_module("colonnade.bench")


Verb = Callable[[argparse.Namespace], int]

# Seconds before a rank reports an exception. If another rank failed first and broke the connection,
# the launcher reports that rank's error and ends this one in the meantime.
GRACE_PERIOD = 5.0


def run_train(arguments: argparse.Namespace) -> int:
    """Runs `colonnade train`; returns the exit status."""
    from colonnade.launcher.train.run import describe, resume, train

    a, overrides = arguments, list(arguments.overrides)
    automatic = a.resume == "auto"
    order: dict[str, Any] = {"nproc": a.nproc, "until": a.until, "automatic": automatic}
    continued = a.run if a.recipe is None else None  # a run that goes on with its own recipe
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
    from colonnade.launcher.generate import generate

    a = arguments
    text = generate(a.checkpoint, a.prompt, a.tokens, a.temperature, a.top_k, a.seed)
    print(a.prompt + text)
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
    if a.all and (a.recipe or a.layout):
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
        report = verify(a.recipe, list(a.overrides), layouts=a.layout, **chosen)
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
    report = plan(a.recipe, list(a.overrides), gpus=a.gpus, dry_run=a.dry_run, device=a.device)
    print(table(report)) if a.json is None else a.report(report)
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """Runs `colonnade doctor`; returns the exit status."""
    from colonnade.launcher.cluster.doctor import doctor

    arguments.report(doctor())
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """Runs `colonnade bench`; returns the exit status."""
    arguments.report(benchmarks().bench(arguments.name, arguments.nproc))
    return 0


@contextmanager
def reporting(target: str | None) -> Iterator[Callable[[dict], None]]:
    """Yields a function that prints a report as aligned lines, or writes it as JSON to `target`.

    With `-` the report is the only output on stdout: other output of this process and of those that
    it starts goes to stderr.
    """
    if target != "-":
        yield lambda report: emit(report, target)
        return
    # Redirect the file descriptor, not only `sys.stdout`: started processes inherit it.
    sys.stdout.flush()
    stdout_copy, stdout = os.dup(1), sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def write_to_stdout(report: dict) -> None:
        sys.stderr.flush()
        with open(stdout_copy, "w", encoding="utf-8", closefd=False) as out:
            out.write(json.dumps(report, indent=2) + "\n")

    try:
        yield write_to_stdout
    finally:
        sys.stderr.flush()
        sys.stdout = stdout
        os.dup2(stdout_copy, 1)
        os.close(stdout_copy)


def emit(report: dict, target: str | None) -> None:
    """Prints a report as aligned lines, or writes it as JSON to a file."""
    if target is None:
        width = max(len(key) for key in report)
        print("\n".join(f"{key:<{width}}  {format_value(value)}" for key, value in report.items()))
        return
    write_text("--json", target, json.dumps(report, indent=2) + "\n")


def write_text(option: str, path: str, text: str) -> None:
    """Writes the file that an option names.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {path}: cannot write it: {error.strerror}") from error


def format_value(value: object) -> str:
    """Formats a value for people: `1,234,567`, `0.8123`, `1.2e+21`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value)


def positive(text: str) -> int:
    """Parses an integer from 1 to 2²⁰, more than any number of ranks or of generated tokens."""
    if not 1 <= (number := int(text)) <= 2**20:
        raise argparse.ArgumentTypeError("must be at least 1 and at most 1048576")
    return number


def not_negative(text: str) -> float:
    """Parses a number of at least 0."""
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="colonnade",
        description="Train language models on anything from a laptop to a cluster.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Verb) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=VERBS[name], description=VERBS[name])
        verb.set_defaults(action=run)
        return verb

    train = add("train", run_train)
    train.add_argument("recipe", nargs="?", help="a path, or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. train.steps=20")
    train.add_argument("--nproc", type=positive, default=1, help="ranks on this host")
    train.add_argument("--run", metavar="DIR", help="the run's folder: made, or gone on with")
    train.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run, or from one of its checkpoints; with --run, `auto`: from the "
        "newest that is whole",
    )
    train.add_argument("--until", type=positive, metavar="STEP", help="stop, saved, after STEP")
    train.add_argument("--runs", help="folder for run folders (default: runs)")

    train.add_argument("--dry-run", action="store_true", help="check it, print its size, stop")

    rank = verbs.add_parser("_rank")
    rank.set_defaults(action=run_rank)
    rank.add_argument("function", help="module:function")
    rank.add_argument("arguments", help="its keyword arguments as JSON")

    verify = add("verify", run_verify)
    verify.add_argument("recipe", nargs="?", help="a path, or the name of a shipped recipe")
    verify.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. model.repeat=1")
    verify.add_argument("--nproc", type=positive, default=1, help="ranks on this host")
    verify.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="tp=2,…",
        help="fields of [parallel], residual and recompute; may be given several times (default: a "
        "set that has every pair of axes and options that is valid)",
    )
    verify.add_argument(
        "--all",
        action="store_true",
        help="four small recipes instead (dense, mixture, hybrid, hybrid mixture), in fp64 alone "
        "and with 2 steps, so that it is affordable (one recipe: fp64 and fp32, 3 steps)",
    )
    verify.add_argument("--sample", type=positive, metavar="K", help="K cases of each set only")
    verify.add_argument("--seed", type=int, default=0, help="draws the sample (default: 0)")
    verify.add_argument("--table", metavar="FILE", help="with --all: what it proved, in Markdown")

    plan = add("plan", run_plan)
    plan.add_argument("recipe", help="a path, or the name of a shipped recipe")
    plan.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. parallel.tp=8")
    plan.add_argument("--gpus", type=positive, required=True, help="ranks of the job")
    plan.add_argument(
        "--dry-run", action="store_true", help="run one rank of it here, without data"
    )

    plan.add_argument("--device", help="refuse what it cannot hold: h100, …, or 80GiB")

    generate = add("generate", run_generate)
    generate.add_argument("checkpoint", help="a run folder, or one of its checkpoints")
    generate.add_argument("--prompt", default="", help="text to continue")
    generate.add_argument("--tokens", type=positive, default=200, help="largest number of tokens")
    generate.add_argument(
        "--temperature", type=not_negative, default=0.8, help="0: the likeliest token"
    )
    generate.add_argument("--top-k", type=positive, help="sample among the k likeliest tokens only")
    generate.add_argument("--seed", type=int, default=0)

    data = add("data", run_data)
    data.add_argument("source", help="file, folder or glob; hub: the name of the data set")
    data.add_argument("destination", help="prefix of the .bin and .idx to write")
    data.add_argument(
        "--format",
        choices=["text", "jsonl", "parquet", "hub", "stdlib"],
        help="default: detected by the files",
    )
    data.add_argument(
        "--tokenizer", default="bytes", help="`bytes`, a tokenizer.json, or its folder"
    )
    data.add_argument("--column", default="text", help="column that holds the text")
    data.add_argument("--prompt", help="column put before the text, without loss")
    data.add_argument("--eod", metavar="TOKEN", help="ends a document (default: the tokenizer's)")
    data.add_argument("--bos", metavar="TOKEN", help="put before every document (default: none)")
    data.add_argument(
        "--special-tokens",
        action="store_true",
        help="the spelling of a special token in a text becomes that token",
    )
    data.add_argument("--overwrite", action="store_true")

    doctor = add("doctor", run_doctor)
    bench = add("bench", run_bench)
    bench.add_argument("name", choices=list(benchmarks().BENCHMARKS))
    bench.add_argument("--nproc", type=positive, help="moe: ranks that divide the experts")
    for verb in (train, verify, plan, data, doctor, bench):
        verb.add_argument("--json", metavar="FILE", help="write the report as JSON; `-` is stdout")
    return parser


# The verbs with their descriptions, and those that are planned.
VERBS = {
    "train": "train a recipe, or resume a run",
    "verify": "compare parallel layouts with one process, at test size",
    "plan": "show what each rank of a job of any size holds and sends",
    "generate": "sample text from a trained model",
    "data": "convert text to packed tokens in Megatron's .bin/.idx format",
    "doctor": "show devices, backends, and which kernel serves each operator",
    "bench": "run a benchmark beside its reference",
}
PLANNED = ("convert", "inspect", "logs", "report", "status", "submit", "sweep")


def unknown_verb(word: str) -> str:
    """Returns the message for a verb that does not exist."""
    if word in PLANNED:
        hint = f"`{word}` is planned and not built yet."
    elif near := difflib.get_close_matches(word, [*VERBS, *PLANNED], 1):
        planned = ", which is planned and not built yet" if near[0] in PLANNED else ""
        hint = f"there is no verb `{word}`; did you mean `{near[0]}`{planned}?"
    else:
        hint = f"there is no verb `{word}`."
    return f"{hint} The verbs are {', '.join(VERBS)}; --help describes each."


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; overrides of a recipe may come before or after options."""
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and not words[0].startswith("-") and words[0] not in (*VERBS, "_rank"):
        parser.error(unknown_verb(words[0]))
    parsed, unparsed = parser.parse_known_args(arguments)
    has_overrides = parsed.verb in ("train", "verify", "plan")
    if unparsed and (not has_overrides or any(word.startswith("-") for word in unparsed)):
        parser.error(f"unrecognized arguments: {' '.join(unparsed)}")
    if unparsed:
        parsed.overrides = [*parsed.overrides, *unparsed]
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit status."""
    with tolerate_closed_streams():
        parsed = parse(arguments)
        with reporting(getattr(parsed, "json", None)) as parsed.report:
            status = run(parsed)
        if status and is_one_of_several_ranks():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # skips clean-up, which could wait for ranks in a collective
    return status


def run(parsed: argparse.Namespace) -> int:
    """Runs a verb; turns exceptions into an exit status and a message."""
    try:
        return parsed.action(parsed)
    except UserError as mistake:
        report_failure(str(mistake), started=parsed.verb.startswith("_"))
        return USER_MISTAKE
    except KeyboardInterrupt:
        if not parsed.verb.startswith("_"):
            print("\ncolonnade: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception:  # an error of this rank, or the consequence of another rank's failure
        if not is_one_of_several_ranks():
            raise
        time.sleep(GRACE_PERIOD)
        sys.excepthook(*sys.exc_info())
        return 1


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or was started without a launcher of ranks."""
    rank_env = RankEnvironment.from_environment()
    return rank_env is None or rank_env.rank == 0


def is_one_of_several_ranks() -> bool:
    """Whether this process is one of several ranks."""
    try:
        rank_env = RankEnvironment.from_environment()
    except UserError:  # was reported already
        return False
    return rank_env is not None and rank_env.size > 1
