"""The command line: `colonnade VERB`. Exits 0 on success, 2 on a user's mistake, 1 otherwise."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from colonnade.launcher.errors import UserError
from colonnade.launcher.ranks import USER_MISTAKE, Place, report_failure

Verb = Callable[[argparse.Namespace], int]


def run_train(arguments: argparse.Namespace) -> int:
    """`colonnade train`."""
    from colonnade.launcher.training import describe, resume, train

    overrides = list(arguments.overrides)
    options = {"nproc": arguments.nproc, "until": arguments.until}
    if arguments.resume is not None:
        if arguments.recipe:
            overrides.insert(0, arguments.recipe)
        return resume(arguments.resume, overrides, **options).status
    if arguments.recipe is None:
        raise UserError("train: name a recipe (for example: quickstart), or --resume RUN")
    if arguments.dry_run:
        emit(describe(arguments.recipe, overrides, nproc=arguments.nproc), arguments.json)
        return 0
    return train(arguments.recipe, overrides, runs=arguments.runs, **options).status


def run_rank(arguments: argparse.Namespace) -> int:
    """A rank that `colonnade train` started."""
    from colonnade.launcher.training import be_started_rank

    be_started_rank(Path(arguments.run), arguments.again, arguments.until)
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    """`colonnade generate`."""
    from colonnade.launcher.generation import generate

    a = arguments
    text = generate(a.checkpoint, a.prompt, a.tokens, a.temperature, a.top_k, a.seed)
    print(a.prompt + text)
    return 0


def run_data(arguments: argparse.Namespace) -> int:
    """`colonnade data`."""
    from colonnade.launcher.corpus import tokenise
    from colonnade.launcher.recipe import SourceConfig

    path = Path(arguments.source)
    kinds = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
    kind = arguments.format or kinds.get(path.suffix, "text")
    fields = {"format": kind, "path": arguments.source, "column": arguments.column}
    source = SourceConfig.model_validate(fields | {"prompt": arguments.prompt})
    summary = tokenise(
        source, Path(arguments.destination), arguments.tokenizer, arguments.overwrite
    )
    emit(asdict(summary), arguments.json)
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """`colonnade doctor`."""
    from colonnade.launcher.health import doctor

    emit(doctor(), arguments.json)
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """`colonnade bench`."""
    from colonnade.launcher.benchmarks import BENCHMARKS

    emit(BENCHMARKS[arguments.name](), arguments.json)
    return 0


def emit(report: dict, target: str | None) -> None:
    """Print a report as aligned lines, or write it as JSON."""
    if target is None:
        width = max(len(key) for key in report)
        for key, value in report.items():
            print(f"{key:<{width}}  {figure(value)}")
    elif target == "-":
        print(json.dumps(report, indent=2))
    else:
        Path(target).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def figure(value: object) -> str:
    """A value for people: `1,234,567`, `0.8123`, `1.2e+21`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value)


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Every verb with its options."""
    parser = argparse.ArgumentParser(
        prog="colonnade",
        description="Train language models on anything from a laptop to a cluster.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Verb, about: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=about, description=about)
        verb.set_defaults(action=run)
        return verb

    train = add("train", run_train, "train a recipe, or resume a run")
    train.add_argument("recipe", nargs="?", help="a path, or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. train.steps=20")
    train.add_argument("--nproc", type=positive, default=1, help="ranks on this host")
    train.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    train.add_argument("--until", type=positive, metavar="STEP", help="stop, saved, after STEP")
    train.add_argument("--runs", default="runs", help="folder for run folders (default: runs)")

    train.add_argument("--dry-run", action="store_true", help="check it, print its size, stop")

    rank = verbs.add_parser("_rank")
    rank.set_defaults(action=run_rank)
    rank.add_argument("run")
    rank.add_argument("--again", action="store_true")
    rank.add_argument("--until", type=positive)

    generate = add("generate", run_generate, "text from a trained model")
    generate.add_argument("checkpoint", help="a run folder, or one of its checkpoints")
    generate.add_argument("--prompt", default="", help="the text to go on from")
    generate.add_argument("--tokens", type=positive, default=200, help="how many at most")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token")
    generate.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all")
    generate.add_argument("--seed", type=int, default=0)

    data = add("data", run_data, "text to packed tokens in Megatron's .bin/.idx format")
    data.add_argument("source", help="file, folder or glob")
    data.add_argument("destination", help="prefix of the .bin and .idx to write")
    data.add_argument("--format", choices=["text", "jsonl", "parquet", "hub", "stdlib"])
    data.add_argument("--tokenizer", default="bytes", help="`bytes`, or a tokenizer.json")
    data.add_argument("--column", default="text", help="column that holds the text")
    data.add_argument("--prompt", help="column put before the text, without loss")
    data.add_argument("--overwrite", action="store_true")

    doctor = add("doctor", run_doctor, "devices, backends, and which kernel serves each operator")
    bench = add("bench", run_bench, "a benchmark, beside its reference in one run")
    bench.add_argument("name", choices=["step", "loader", "scan"])
    for verb in (train, data, doctor, bench):
        verb.add_argument("--json", metavar="FILE", help="write the report as JSON; `-` is stdout")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    chosen = build_parser().parse_args(arguments)
    try:
        status = chosen.action(chosen)
    except UserError as mistake:
        status = USER_MISTAKE
        report_failure(str(mistake))
    except BrokenPipeError:
        status = 1
    if status and Place.from_environment():
        sys.stdout.flush()
        os._exit(status)  # other ranks may be waiting in a collective: leave without its clean-up
    return status
