"""The verbs of the command line, their options, and the parser of both."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence

from colonnade.launcher.cli import jobs, verbs

Verb = Callable[[argparse.Namespace], int]


def positive(text: str) -> int:
    """Parses an integer from 1 to 2²⁰, more than any number of ranks or of generated tokens."""
    if not 1 <= (number := int(text)) <= 2**20:
        raise argparse.ArgumentTypeError("must be at least 1 and at most 1048576")
    return number


def count(text: str) -> int:
    """Parses an integer of at least 0."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def not_negative(text: str) -> float:
    """Parses a number of at least 0."""
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def share(text: str) -> float:
    """Parses a number above 0 and of at most 1."""
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="colonnade",
        description="Train language models on anything from a laptop to a cluster.",
    )
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Verb) -> argparse.ArgumentParser:
        verb = subparsers.add_parser(name, help=VERBS[name], description=VERBS[name])
        verb.set_defaults(action=run)
        return verb

    train = add("train", verbs.run_train)
    train.add_argument("recipe", nargs="?", help="a path, or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. train.steps=20")
    train.add_argument("--nproc", type=positive, default=1, help="ranks on this host")
    train.add_argument(
        "--run",
        "--run-dir",  # torchrun takes `--run` for an abbreviation of an option of its own
        metavar="DIR",
        help="the run's folder: made, or gone on with (under torchrun: --run-dir)",
    )
    train.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run, or from one of its checkpoints; with --run, `auto`: from the "
        "newest that is whole",
    )
    train.add_argument("--until", type=positive, metavar="STEP", help="stop, saved, after STEP")
    train.add_argument(
        "--restarts",
        type=count,
        default=0,
        metavar="N",
        help="start the --nproc ranks again, up to N times, after one has failed",
    )
    train.add_argument("--runs", help="folder for run folders (default: runs)")

    train.add_argument("--dry-run", action="store_true", help="check it, print its size, stop")

    rank = subparsers.add_parser(RANK)
    rank.set_defaults(action=verbs.run_rank)
    rank.add_argument("function", help="module:function")
    rank.add_argument("arguments", help="its keyword arguments as JSON")

    verify = add("verify", verbs.run_verify)
    verify.add_argument("recipe", nargs="?", help="a path, or the name of a shipped recipe")
    verify.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. model.repeat=1")
    verify.add_argument("--nproc", type=positive, default=1, help="ranks on this host")
    verify.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="tp=2,…",
        help="fields of [parallel], residual, recompute and offload; may be given several times "
        "(default: a set that has every pair of axes and options that is valid)",
    )
    verify.add_argument(
        "--all",
        action="store_true",
        help="four small recipes instead (dense, mixture, hybrid, hybrid mixture), in fp64 alone "
        "and with 2 steps, so that it is affordable (one recipe: fp64 and fp32, 3 steps)",
    )
    stage_help = "of a recipe with training stages: which one, from 0"
    verify.add_argument("--stage", type=count, help=stage_help)
    verify.add_argument("--sample", type=positive, metavar="K", help="K cases of each set only")
    verify.add_argument("--seed", type=int, default=0, help="draws the sample (default: 0)")
    verify.add_argument("--table", metavar="FILE", help="with --all: what it proved, in Markdown")

    plan = add("plan", verbs.run_plan)
    plan.add_argument("recipe", help="a path, or the name of a shipped recipe")
    plan.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. parallel.tp=8")
    plan.add_argument("--gpus", type=positive, required=True, help="ranks of the job")
    plan.add_argument(
        "--dry-run", action="store_true", help="run one rank of it here, without data"
    )

    plan.add_argument("--stage", type=count, help=stage_help)
    plan.add_argument("--device", help="refuse what it cannot hold: h100, …, or 80GiB")
    plan.add_argument(
        "--host-memory",
        type=float,
        metavar="GIB",
        help="of the host of a --device, for each device (default: of the vendor's servers)",
    )

    add_generate(add("generate", verbs.run_generate))

    evaluation = add("eval", verbs.run_eval)
    add_eval(evaluation)

    data = add("data", verbs.run_data)
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

    convert = add("convert", verbs.run_convert)
    convert.add_argument("source", help="a run, a checkpoint, or a Hugging Face folder")
    convert.add_argument("destination", help="the folder to write; it must not exist")
    convert.add_argument("--to", choices=["hf", "native"], required=True)
    convert.add_argument(
        "--dtype", choices=["fp64", "fp32", "bf16", "fp16"], help="default: of each tensor"
    )
    convert.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="weight surgery, several in order: ladder=N, blocks=0-3,3,5, norm=pre_rms, "
        "experts=8,top_k=2, average=PATH",
    )
    convert.add_argument("--family", help="Hugging Face's class (default: the first that fits)")

    inspect = add("inspect", verbs.run_inspect)
    inspect.add_argument(
        "checkpoint", help="a checkpoint, a run (its newest), or a Hugging Face folder"
    )
    inspect.add_argument("other", nargs="?", help="compare with this one")

    jobs.add_submit(add("submit", jobs.run_submit), positive)
    jobs.add_status(add("status", jobs.run_status))
    jobs.add_logs(add("logs", jobs.run_logs), count)
    jobs.add_hidden(subparsers.add_parser)

    doctor = add("doctor", verbs.run_doctor)
    add_doctor(doctor)
    bench = add("bench", verbs.run_bench)
    bench.add_argument("name", choices=list(verbs.benchmarks().BENCHMARKS))
    bench.add_argument("--nproc", type=positive, help="moe: ranks that divide the experts")
    for verb in (train, verify, plan, evaluation, data, convert, inspect, doctor, bench):
        verb.add_argument("--json", metavar="FILE", help="write the report as JSON; `-` is stdout")
    return parser


def add_doctor(verb: argparse.ArgumentParser) -> None:
    """Adds the options of `doctor`."""
    verb.add_argument(
        "--cluster",
        action="store_true",
        help="as every rank of an allocation (srun or torchrun): measure all pairs of hosts, their "
        "clocks and processors, compare versions and settings, and say what is wrong (status 1); "
        "pairs are measured in as many rounds as there are hosts, of about half a second",
    )
    verb.add_argument("--nproc", type=positive, help="with --cluster: ranks on this host")
    verb.add_argument(
        "--picture", metavar="FILE", help="with --cluster: a heat map of bandwidth (.png or .svg)"
    )


def add_model(verb: argparse.ArgumentParser) -> None:
    """Adds the options that say which trained model runs forward, and where."""
    verb.add_argument("model", help="a run, one of its checkpoints, or a Hugging Face folder")
    verb.add_argument("--nproc", type=positive, default=1, help="ranks on this host")


def add_generate(verb: argparse.ArgumentParser) -> None:
    """Adds the options of `generate`."""
    verb.epilog = (
        "The model sees as many tokens as the sequences had on which it was trained (of a Hugging "
        "Face folder max_position_embeddings; train.seq_len=N sets another number): where a text "
        "becomes longer, the model starts anew from the last half of them."
    )
    add_model(verb)
    verb.add_argument(
        "overrides",
        nargs="*",
        metavar="field=value",
        help="of [parallel], such as parallel.pp=2 (default: ranks are tensor parallel), "
        "train.precision, train.device, train.seq_len, or the tokenizer's in [data]",
    )
    prompts = verb.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", default="", help="text to continue")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="many prompts: a line each, or the field `prompt` of a .jsonl; each is printed with "
        "its text on a line as soon as it is done, line breaks as \\n",
    )
    verb.add_argument(
        "--batch", type=positive, default=8, help="prompts that go forward together (default: 8)"
    )
    verb.add_argument("--tokens", type=positive, default=200, help="largest number of tokens")
    verb.add_argument(
        "--temperature", type=not_negative, default=0.8, help="0: the likeliest token"
    )
    verb.add_argument("--top-k", type=positive, help="sample among the k likeliest tokens only")
    verb.add_argument(
        "--top-p", type=share, help="sample among the likeliest tokens of this probability only"
    )
    verb.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of draws, which depend neither on the batch nor on the ranks",
    )
    verb.add_argument(
        "--json",
        dest="json_lines",
        metavar="FILE",
        help="write JSON lines with index, prompt, text, tokens and why it ended; `-` is stdout",
    )


def add_eval(verb: argparse.ArgumentParser) -> None:
    """Adds the options of `eval`."""
    verb.epilog = (
        "Documents follow each other and are divided into rows, as in training: a document sees no "
        "other one, and nothing before a row's begin. Every token counts once, but the first of a "
        "document, which nothing predicts unless data.bos comes before it."
    )
    add_model(verb)
    verb.add_argument(
        "overrides",
        nargs="*",
        metavar="DATA | field=value",
        help="files, folders or globs; and overrides of [parallel], such as parallel.tp=2 (ranks "
        "are data parallel by default), train.precision, train.device, or the tokenizer's in "
        "[data]",
    )
    verb.add_argument(
        "--format",
        choices=["text", "jsonl", "parquet", "hub", "stdlib", "tokens"],
        help="default: detected by the files",
    )
    verb.add_argument("--column", help="column that holds the text (default: text)")
    verb.add_argument("--prompt", help="column put before the text, without loss")
    verb.add_argument(
        "--batch", type=positive, default=8, help="rows of a forward pass (default: 8)"
    )
    verb.add_argument(
        "--seq-len",
        type=positive,
        metavar="N",
        help="tokens of a row (default: of the sequences in training, at most 4096)",
    )
    verb.add_argument(
        "--rows", type=positive, metavar="N", help="N rows of each source, evenly spaced (all)"
    )
    tasks = verb.add_argument_group("instead of DATA, tasks of lm-evaluation-harness")
    tasks.add_argument("--tasks", metavar="NAMES", help="their names, with commas")
    tasks.add_argument("--include-path", metavar="DIR", help="a folder with other tasks")
    tasks.add_argument("--limit", type=positive, metavar="N", help="N examples of each task (all)")


# The verbs with their descriptions, and those that are planned.
VERBS = {
    "train": "train a recipe, or resume a run",
    "verify": "compare parallel layouts with one process, at test size",
    "plan": "show what each rank of a job of any size holds and sends",
    "generate": "sample text from a trained model",
    "eval": "compute a trained model's loss, perplexity and bits per byte on text",
    "data": "convert text to packed tokens in Megatron's .bin/.idx format",
    "convert": "write weights of a run as a Hugging Face folder, or the reverse",
    "inspect": "show what a checkpoint holds and check its files, or compare two",
    "submit": "check a recipe at a job's size, and submit a script that trains it to SLURM",
    "status": "show the state of submitted jobs, and how far their runs have come",
    "logs": "show the output of a submitted job, or follow it until its end",
    "doctor": "show devices, backends, and which kernel serves each operator",
    "bench": "run a benchmark beside its reference",
}
PLANNED = ("report", "sweep")
RANK = "_rank"  # the verb of ranks that we start
HIDDEN = (RANK, jobs.AFTER, jobs.ORDER)


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
    if words and not words[0].startswith("-") and words[0] not in (*VERBS, *HIDDEN):
        parser.error(unknown_verb(words[0]))
    parsed, unparsed = parser.parse_known_args(arguments)
    has_overrides = hasattr(parsed, "overrides")
    if unparsed and (not has_overrides or any(word.startswith("-") for word in unparsed)):
        parser.error(f"unrecognized arguments: {' '.join(unparsed)}")
    if unparsed:
        parsed.overrides = [*parsed.overrides, *unparsed]
    return parsed
