"""The verb `eval`: loss, perplexity and bits per byte of a trained model over whole sources."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import choose_device, start_ranks
from colonnade.launcher.data.files import resolve_format, source_name
from colonnade.launcher.data.tokenizer import tokenizer_of
from colonnade.launcher.errors import UserError
from colonnade.launcher.evaluate.rows import open_rows
from colonnade.launcher.generate.opening import opened, recipe_for
from colonnade.launcher.recipe.tables import WITH_COLUMNS, Recipe, SourceConfig
from colonnade.launcher.train.losses import Sums, sum_losses
from colonnade.launcher.train.step import sync_errors

ORDER, REPORT = "order.json", "report.json"
SEQ_LEN = 4096  # tokens of a row unless --seq-len says more: of models that are made for more


@dataclass(frozen=True)
class Order:
    """What is evaluated; JSON can represent it. The attributes are the arguments of `evaluate`."""

    model: str
    data: tuple[str, ...]
    column: str = "text"
    prompt: str | None = None
    format: str | None = None
    batch: int = 8
    seq_len: int | None = None
    rows: int | None = None
    overrides: tuple[str, ...] = ()

    def sources(self) -> list[SourceConfig]:
        """Returns the sources to read, each with the format of its files.

        Raises:
            UserError: there is none, or a file is missing.
        """
        fields: dict[str, Any] = {"column": self.column, "prompt": self.prompt}
        if self.format is not None:
            fields["format"] = self.format
        if self.format == "stdlib":
            if self.data:
                raise UserError("eval: --format stdlib reads no files: leave out what it names")
            return [SourceConfig.model_validate(fields)]
        if not self.data:
            raise UserError("eval: name the data: a file, a folder, a glob, or --tasks")
        named = [SourceConfig.model_validate({**fields, "path": path}) for path in self.data]
        sources = list(map(resolve_format, named))
        for source in sources:
            if (self.prompt or self.column != "text") and source.format not in WITH_COLUMNS:
                raise UserError(
                    f"eval: {source_name(source)} has no columns: leave out --column and --prompt"
                )
        return sources

    def recipe(self, world_size: int) -> Recipe:
        """Returns the recipe under which the model runs."""
        model, overrides = Path(self.model), list(self.overrides)
        given = any(o.startswith("train.seq_len=") for o in overrides)
        if self.seq_len is not None and given:
            raise UserError("eval: --seq-len is train.seq_len: leave one of both out")
        if self.seq_len is not None:
            overrides.append(f"train.seq_len={self.seq_len}")
        elif not given:
            longest = recipe_for(model).train.seq_len
            overrides.append(f"train.seq_len={min(longest, SEQ_LEN)}")
        return recipe_for(model, overrides, world_size)


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    column: str = "text",
    prompt: str | None = None,
    format: str | None = None,
    batch: int = 8,
    seq_len: int | None = None,
    rows: int | None = None,
    overrides: Sequence[str] = (),
    nproc: int = 1,
) -> dict[str, Any]:
    """Computes the loss of a trained model over whole sources of text or tokens.

    The documents of a source follow each other, and are divided into rows, as in training: a
    document sees no other one, and what stands before a row's begin is not seen. Every token
    counts once, but for the first one of a document, which nothing predicts unless `data.bos`
    comes before it; the end of a document counts as a token of no bytes.

    Under torchrun every rank makes the same call, and `nproc` is ignored.

    Args:
        model: a run, one of its checkpoints, or a Hugging Face folder.
        data: files, folders or globs; with format `hub` names of data sets, with `tokens` paths of
            .bin files without .bin.
        column: the column that holds the text.
        prompt: the column of a prompt that precedes the text and has no loss.
        format: of the files; None: it is detected.
        batch: rows of a forward pass of one rank.
        seq_len: tokens of a row; None: of the sequences in training, at most 4096.
        rows: evaluates so many rows of each source, evenly spaced; None: all.
        overrides: `field=value`, such as `parallel.tp=2`, as for `recipe_for`.
        nproc: ranks to start on this host.

    Returns:
        the report, on every rank: `loss` in nats and `perplexity` per token, `bits_per_byte` (None
        without a tokenizer), `tokens`, `bytes`, `rows`, `seq_len`, and under `sources` the same of
        each source by itself.

    Raises:
        UserError: the model or a source cannot be read; RecipeError lists all faults of the layout.
    """
    named = [data] if isinstance(data, str | Path) else list(data)
    order = Order(
        str(model), tuple(map(str, named)), column, prompt, format, batch, seq_len, rows,
        tuple(overrides),
    )  # fmt: skip
    environment = RankEnvironment.from_environment()
    if environment is not None or nproc == 1:
        return evaluate_as_rank(order)
    # a fault that every rank would report is reported once, before ranks start
    recipe = order.recipe(nproc)
    choose_device(recipe.train.device, RankEnvironment.on_one_host(0, nproc))
    open_sources(order, recipe)
    with tempfile.TemporaryDirectory(prefix="colonnade-eval-") as folder:
        Path(folder, ORDER).write_text(json.dumps(asdict(order)), encoding="utf-8")
        if status := start_ranks(evaluate_as_started_rank, {"folder": folder}, nproc):
            raise SystemExit(status)
        return json.loads(Path(folder, REPORT).read_text(encoding="utf-8"))


def evaluate_as_started_rank(folder: str) -> None:
    """Takes part as a rank that `evaluate` started; rank 0 writes the report into the folder."""
    fields = json.loads(Path(folder, ORDER).read_text(encoding="utf-8"))
    lists = {"data": tuple(fields["data"]), "overrides": tuple(fields["overrides"])}
    report = evaluate_as_rank(Order(**{**fields, **lists}))
    environment = RankEnvironment.from_environment()
    if environment is None or environment.rank == 0:
        Path(folder, REPORT).write_text(json.dumps(report), encoding="utf-8")


def open_sources(order: Order, recipe: Recipe) -> None:
    """Opens the sources once, so that text is in the cache before ranks ask for it."""
    tokenizer = tokenizer_of(recipe.data)
    for source in order.sources():
        open_rows(recipe, source, tokenizer)


def evaluate_as_rank(order: Order) -> dict[str, Any]:
    """Evaluates as one rank; returns the report, on every rank."""
    environment = RankEnvironment.from_environment()
    size = environment.size if environment else 1
    sources, recipe = order.sources(), order.recipe(size)
    overrides = (*order.overrides, f"train.seq_len={recipe.train.seq_len}")
    begin, total, all_rows = time.monotonic(), Sums(0.0, 0, 0), 0
    by_source: dict[str, dict[str, Any]] = {}
    with opened(Path(order.model), overrides) as trained:
        for source in sources:
            open_this = partial(open_rows, trained.recipe, source, trained.tokenizer)
            alone = trained.mesh is None
            rows = open_this() if alone else sync_errors(open_this, trained.device)
            count = min(order.rows or rows.rows, rows.rows)
            samples = [i * rows.rows // count for i in range(count)]
            sums = sum_losses(
                trained.passes, trained.mesh, rows, samples, order.batch, trained.byte_lengths
            )
            by_source[source_name(source)] = {**sums.figures(), "rows": count}
            total, all_rows = total.plus(sums), all_rows + count
    return {
        "model": order.model,
        **total.figures(),
        "rows": all_rows,
        "seq_len": recipe.train.seq_len,
        "layout": recipe.parallel.layout(size),
        "seconds": round(time.monotonic() - begin, 3),
        "sources": by_source,
    }


def table(report: dict[str, Any]) -> str:
    """Returns the report as lines: a header, each source, and all of them together."""
    names = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "rows")
    lines = [f"{'loss':>10}{'perplexity':>14}{'bits/byte':>11}{'tokens':>14}{'rows':>10}"]
    sources = dict(report["sources"])
    if len(sources) > 1:
        sources["all"] = {name: report[name] for name in names}
    for name, of in sources.items():
        bits = "-" if of["bits_per_byte"] is None else f"{of['bits_per_byte']:.5f}"
        lines.append(
            f"{of['loss']:>10.6f}{of['perplexity']:>14,.4f}{bits:>11}{of['tokens']:>14,}"
            f"{of['rows']:>10,}  {name}"
        )
    return "\n".join(lines)
