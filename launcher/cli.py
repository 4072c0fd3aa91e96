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
from colonnade.launcher.console import forgiving_streams
from colonnade.launcher.errors import UserError


def benchmarks() -> Any:
    """The benchmarks' package: they import the launcher, so it imports them by name alone."""
    return importlib.import_module("colonnade.bench")


Verb = Callable[[argparse.Namespace], int]

# Seconds before a rank tells of an exception: if another one failed first, which breaks the
# connection, the launcher tells that one's error and ends this rank in the meantime.
GRACE = 5.0


def run_train(arguments: argparse.Namespace) -> int:
    """`colonnade train`."""
    from colonnade.launcher.train.run import describe, resume, train

    a, overrides = arguments, list(arguments.overrides)
    if a.resume is not None:
        unused = [name for name in ("dry_run", "runs") if getattr(a, name)]
        if unused:
            options = " ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise UserError(f"train --resume goes on in the run's own folder: leave out {options}")
        if a.recipe:
            overrides.insert(0, a.recipe)
        run = resume(a.resume, overrides, nproc=a.nproc, until=a.until)
    elif a.recipe is None:
        raise UserError("train: name a recipe (for example: quickstart), or --resume RUN")
    elif a.dry_run:
        a.report(describe(a.recipe, overrides, nproc=a.nproc))
        return 0
    else:
        folder = a.runs or "runs"
        run = train(a.recipe, overrides, nproc=a.nproc, runs=folder, until=a.until)
    environment = RankEnvironment.from_environment()
    if a.json and (environment is None or environment.rank == 0):
        a.report(run.summary())
    return run.status


def run_rank(arguments: argparse.Namespace) -> int:
    """The hidden verb of the ranks that `start_ranks` starts."""
    from colonnade.launcher.cluster.ranks import run_as_rank

    run_as_rank(arguments.function, arguments.arguments)
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    """`colonnade generate`."""
    from colonnade.launcher.generate import generate

    a = arguments
    text = generate(a.checkpoint, a.prompt, a.tokens, a.temperature, a.top_k, a.seed)
    print(a.prompt + text)
    return 0


def run_data(arguments: argparse.Namespace) -> int:
    """`colonnade data`."""
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
    """`colonnade verify`."""
    from colonnade.launcher.verify.run import verify
    from colonnade.launcher.verify.table import table

    a = arguments
    report = verify(a.recipe, list(a.overrides), nproc=a.nproc, layouts=a.layout)
    environment = RankEnvironment.from_environment()
    if environment is None or environment.rank == 0:
        print(table(report)) if a.json is None else a.report(report)
    return 0 if report["equal"] else 1


def run_doctor(arguments: argparse.Namespace) -> int:
    """`colonnade doctor`."""
    from colonnade.launcher.cluster.doctor import doctor

    arguments.report(doctor())
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """`colonnade bench`."""
    arguments.report(benchmarks().bench(arguments.name))
    return 0


@contextmanager
def reporting(target: str | None) -> Iterator[Callable[[dict], None]]:
    """A function that prints a report as aligned lines, or writes it as JSON to `target`.

    With `-` the report is all that stdout gets: what is printed in the meantime, by this process or
    those it starts, goes to stderr.
    """
    if target != "-":
        yield lambda report: emit(report, target)
        return
    sys.stdout.flush()
    before, stream = os.dup(1), sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def alone(report: dict) -> None:
        sys.stderr.flush()
        with open(before, "w", encoding="utf-8", closefd=False) as out:
            out.write(json.dumps(report, indent=2) + "\n")

    try:
        yield alone
    finally:
        sys.stderr.flush()
        sys.stdout = stream
        os.dup2(before, 1)
        os.close(before)


def emit(report: dict, target: str | None) -> None:
    """Print a report as aligned lines, or write it as JSON to a file."""
    if target is None:
        width = max(len(key) for key in report)
        print("\n".join(f"{key:<{width}}  {figure(value)}" for key, value in report.items()))
        return
    try:
        Path(target).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {target}: cannot write it: {error.strerror}") from error


def figure(value: object) -> str:
    """A value for people: `1,234,567`, `0.8123`, `1.2e+21`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value)


def positive(text: str) -> int:
    """A whole number from 1 to 2²⁰: more than there are ranks, or tokens in a text."""
    if not 1 <= (number := int(text)) <= 2**20:
        raise argparse.ArgumentTypeError("must be at least 1 and at most 1048576")
    return number


def not_negative(text: str) -> float:
    """A number from 0."""
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Every verb with its options."""
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
    train.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    train.add_argument("--until", type=positive, metavar="STEP", help="stop, saved, after STEP")
    train.add_argument("--runs", help="folder for run folders (default: runs)")

    train.add_argument("--dry-run", action="store_true", help="check it, print its size, stop")

    rank = verbs.add_parser("_rank")
    rank.set_defaults(action=run_rank)
    rank.add_argument("function", help="module:function")
    rank.add_argument("arguments", help="its keyword arguments as JSON")

    verify = add("verify", run_verify)
    verify.add_argument("recipe", help="a path, or the name of a shipped recipe")
    verify.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. model.repeat=1")
    verify.add_argument("--nproc", type=positive, default=1, help="ranks on this host")
    verify.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="tp=2,…",
        help="fields of [parallel], may be given several times (default: all that are valid)",
    )

    generate = add("generate", run_generate)
    generate.add_argument("checkpoint", help="a run folder, or one of its checkpoints")
    generate.add_argument("--prompt", default="", help="the text to go on from")
    generate.add_argument("--tokens", type=positive, default=200, help="how many at most")
    generate.add_argument("--temperature", type=not_negative, default=0.8, help="0: the likeliest")
    generate.add_argument("--top-k", type=positive, help="draw among the k likeliest only")
    generate.add_argument("--seed", type=int, default=0)

    data = add("data", run_data)
    data.add_argument("source", help="file, folder or glob; hub: the name of the data set")
    data.add_argument("destination", help="prefix of the .bin and .idx to write")
    data.add_argument(
        "--format",
        choices=["text", "jsonl", "parquet", "hub", "stdlib"],
        help="default: what the files are",
    )
    data.add_argument(
        "--tokenizer", default="bytes", help="`bytes`, or a tokenizer.json or its folder"
    )
    data.add_argument("--column", default="text", help="column that holds the text")
    data.add_argument("--prompt", help="column put before the text, without loss")
    data.add_argument("--eod", metavar="TOKEN", help="ends a document (default: the tokenizer's)")
    data.add_argument("--bos", metavar="TOKEN", help="put before every document (default: none)")
    data.add_argument(
        "--special-tokens",
        action="store_true",
        help="the spelling of a special token in a text is that token",
    )
    data.add_argument("--overwrite", action="store_true")

    doctor = add("doctor", run_doctor)
    bench = add("bench", run_bench)
    bench.add_argument("name", choices=list(benchmarks().BENCHMARKS))
    for verb in (train, verify, data, doctor, bench):
        verb.add_argument("--json", metavar="FILE", help="write the report as JSON; `-` is stdout")
    return parser


# The verbs that there are, with what they do; and those to come.
VERBS = {
    "train": "train a recipe, or resume a run",
    "verify": "compare layouts with one process, at test size",
    "generate": "text from a trained model",
    "data": "text to packed tokens in Megatron's .bin/.idx format",
    "doctor": "devices, backends, and which kernel serves each operator",
    "bench": "a benchmark, beside its reference in one run",
}
PLANNED = ("convert", "inspect", "logs", "plan", "report", "status", "submit", "sweep")


def unknown_verb(word: str) -> str:
    """What to say of a verb that does not exist."""
    if word in PLANNED:
        hint = f"`{word}` is planned and not built yet."
    elif near := difflib.get_close_matches(word, [*VERBS, *PLANNED], 1):
        planned = ", which is planned and not built yet" if near[0] in PLANNED else ""
        hint = f"there is no verb `{word}`; did you mean `{near[0]}`{planned}?"
    else:
        hint = f"there is no verb `{word}`."
    return f"{hint} The verbs are {', '.join(VERBS)}; --help tells of each."


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments as given; a recipe's overrides may stand before or after options."""
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and not words[0].startswith("-") and words[0] not in (*VERBS, "_rank"):
        parser.error(unknown_verb(words[0]))
    chosen, rest = parser.parse_known_args(arguments)
    takes = chosen.verb in ("train", "verify")
    if rest and (not takes or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        chosen.overrides = [*chosen.overrides, *rest]
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    with forgiving_streams():
        chosen = parse(arguments)
        with reporting(getattr(chosen, "json", None)) as chosen.report:
            status = run(chosen)
        if status and among_ranks():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # other ranks may wait in a collective: leave without its clean-up
    return status


def run(chosen: argparse.Namespace) -> int:
    """Run a verb; what ends it early becomes an exit status and a message."""
    try:
        return chosen.action(chosen)
    except UserError as mistake:
        report_failure(str(mistake), started=chosen.verb.startswith("_"))
        return USER_MISTAKE
    except KeyboardInterrupt:
        if not chosen.verb.startswith("_"):
            print("\ncolonnade: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception:  # of our own making, or that of a peer which is gone
        if not among_ranks():
            raise
        time.sleep(GRACE)
        sys.excepthook(*sys.exc_info())
        return 1


def among_ranks() -> bool:
    """Whether this process is one of several ranks."""
    try:
        environment = RankEnvironment.from_environment()
    except UserError:  # which was told
        return False
    return environment is not None and environment.size > 1
