"""The verb `generate`: texts that follow prompts, by one process or by ranks."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import choose_device, start_ranks
from colonnade.launcher.errors import UserError
from colonnade.launcher.generate.extending import Text, extend_texts
from colonnade.launcher.generate.opening import Trained, opened, recipe_for
from colonnade.launcher.generate.prompts import first_tokens
from colonnade.launcher.generate.sampling import Sampling
from colonnade.launcher.generate.streaming import TextStream, continuation
from colonnade.launcher.recipe.tables import Recipe

ORDER = "order.json"


def ignore(of: object) -> None:
    """Takes no notice."""


@dataclass(frozen=True)
class Order:
    """What is generated; JSON can represent it.

    Attributes:
        model: a run, one of its checkpoints, or a Hugging Face folder.
        prompts: the texts to continue.
        tokens: the largest number of tokens of each.
        sampling: fields of `Sampling`.
        batch: prompts that go forward together.
        overrides: `field=value`, as for `recipe_for`.
    """

    model: str
    prompts: list[str]
    tokens: int
    sampling: dict[str, float | int | None]
    batch: int = 8
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generated:
    """A text that was generated.

    Attributes:
        index: of its prompt.
        prompt: that it follows.
        text: without the prompt.
        tokens: ids of the text.
        ended: `end of document`, or `length`.
    """

    index: int
    prompt: str
    text: str
    tokens: list[int]
    ended: str


Done = Callable[[Generated], object]
Piece = Callable[[str], object]


def generate(
    checkpoint: str | Path,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    top_p: float | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Generates text that follows `prompt` with a trained model; returns it without the prompt.

    The model sees as many tokens as the sequences had on which it was trained: where a text becomes
    longer, it starts anew from the last half of them.

    Args:
        checkpoint: a run, one of its checkpoints, or a Hugging Face folder.
        tokens: the largest number of tokens; the end of the document ends the text earlier.
        temperature: 0 always takes the most likely token.
        top_k: draws only among the k most likely tokens; None: among all.
        seed: of the drawn tokens, and of random experts (THOR).
        top_p: draws only among the most likely tokens that together have this probability.
        overrides: `field=value`, such as `train.precision=bf16`.

    Raises:
        UserError: there is no model, or the prompt needs tokens that the model lacks.
    """
    sampling = asdict(Sampling(temperature, top_k, top_p, seed))
    order = Order(str(checkpoint), [prompt], tokens, sampling, overrides=tuple(overrides))
    return generate_texts(order)[0].text


def generate_texts(order: Order, done: Done = ignore) -> list[Generated]:
    """Generates the texts of an order; `done` is called with each as soon as it is complete."""
    found: list[Generated] = []

    def keep(generated: Generated) -> None:
        found.append(generated)
        done(generated)

    with opened(Path(order.model), order.overrides, check=check_layout) as trained:
        generate_with(trained, order, keep)
    return sorted(found, key=lambda generated: generated.index)


def generate_with(trained: Trained, order: Order, done: Done, piece: Piece = ignore) -> None:
    """Generates the texts of an order, batch after batch. Collective.

    Args:
        done: is called with each text as soon as it is complete.
        piece: is called with the prompt and with the pieces of its text as they come, where there
            is one prompt.
    """
    tokenizer, model = trained.tokenizer, trained.recipe.model
    if tokenizer is None:
        raise UserError(
            f"{order.model}: no tokenizer is known, as that of a model trained on token files; "
            "give data.tokenizer=... (a tokenizer.json, or bytes)"
        )
    encoded = [first_tokens(prompt, tokenizer, model.vocab) for prompt in order.prompts]
    stream, single = TextStream(tokenizer, encoded[0]), len(order.prompts) == 1
    if single:
        piece(order.prompts[0])

    def advance(text: Text) -> None:
        if single:
            piece(stream.advance(text.prompt + text.generated, text.ended is not None))
        if text.ended is not None:
            prompt = order.prompts[text.number]
            words = continuation(tokenizer, text.prompt, text.generated)
            done(Generated(text.number, prompt, words, text.generated, text.ended))

    for first in range(0, len(encoded), order.batch):
        some = range(first, min(first + order.batch, len(encoded)))
        extend_texts(
            trained.passes,
            [Text(index, encoded[index]) for index in some],
            order.tokens,
            trained.recipe.train.seq_len,
            tokenizer.eod,
            Sampling(**order.sampling),  # type: ignore[arg-type]
            notify=advance,
        )


def check_layout(recipe: Recipe, world_size: int) -> None:
    """Raises UserError for a layout whose ranks would all do the same."""
    for axis, reason in (
        ("cp", "it divides sequences, and generation goes token by token"),
        ("dp_replicate", "every copy of the model would generate the same texts"),
    ):
        if (degree := recipe.parallel.degrees(world_size)[axis]) > 1:
            raise UserError(
                f"generate: parallel.{axis} = {degree}: {reason}; divide the model by parallel.tp, "
                "parallel.pp, or parallel.dp_shard"
            )


# The command


def run(order: Order, nproc: int, lines: str | None, streaming: bool) -> int:
    """Generates as the ranks of this job, or as `nproc` that it starts; prints and writes.

    Args:
        order: what is generated.
        nproc: ranks; without an override of [parallel] they are tensor parallel.
        lines: the file of JSON lines, `-` for stdout; None: texts are printed.
        streaming: whether the text of a single prompt is printed piece by piece.

    Returns:
        the exit status.
    """
    environment = RankEnvironment.from_environment()
    size = environment.size if environment else nproc
    if size > 1 and not any(o.startswith("parallel.") for o in order.overrides):
        order = Order(**{**asdict(order), "overrides": (*order.overrides, f"parallel.tp={size}")})
    if environment is not None or nproc == 1:
        run_as_rank(order, lines, streaming)
        return 0
    # a fault that every rank would report is reported once, before ranks start
    recipe = recipe_for(Path(order.model), order.overrides, nproc)
    check_layout(recipe, nproc)
    choose_device(recipe.train.device, RankEnvironment.on_one_host(0, nproc))
    with tempfile.TemporaryDirectory(prefix="colonnade-generate-") as folder:
        Path(folder, ORDER).write_text(json.dumps(asdict(order)), encoding="utf-8")
        given = {"folder": folder, "lines": lines, "streaming": streaming}
        return start_ranks(run_as_started_rank, given, nproc)


def run_as_started_rank(folder: str, lines: str | None, streaming: bool) -> None:
    """Takes part as a rank that `run` started: reads the order from the folder."""
    order = Order(**json.loads(Path(folder, ORDER).read_text(encoding="utf-8")))
    run_as_rank(order, lines, streaming)


def run_as_rank(order: Order, lines: str | None, streaming: bool) -> None:
    """Generates as one rank; rank 0 prints and writes."""
    environment = RankEnvironment.from_environment()
    writes = environment is None or environment.rank == 0

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    streams = streaming and lines is None
    with (
        opened(Path(order.model), order.overrides, say, check_layout) as trained,
        opened_lines(lines if writes else None) as out,
    ):

        def put(text: str) -> None:
            out.write(text)
            out.flush()

        def done(generated: Generated) -> None:
            if lines is not None:
                put(json.dumps(asdict(generated), ensure_ascii=False) + "\n")
            else:
                put("\n" if streams else one_line(generated.prompt + generated.text) + "\n")

        if writes:
            generate_with(trained, order, done, put if streams else ignore)
        else:
            generate_with(trained, order, ignore)


@contextmanager
def opened_lines(lines: str | None) -> Iterator[TextIO]:
    """Opens the file that texts are written to; without one, or for `-`, it is stdout."""
    if lines is None or lines == "-":
        yield sys.stdout
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(lines).open("w", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--json {lines}: cannot write it: {error.strerror}") from error
        yield file


def one_line(text: str) -> str:
    """Returns a text with its line breaks written as `\\n`."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
