"""The verb `eval`: the loss of whole sources equals a loop over transformers, on any layout."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from equal import assert_equal
from ranks import Ranks
from torch.nn.functional import cross_entropy
from trained import llama_folder, run_folder

from colonnade.launcher.cli import main
from colonnade.launcher.data import open_data
from colonnade.launcher.evaluate.rows import open_rows
from colonnade.launcher.evaluate.run import Order, evaluate
from colonnade.launcher.generate.opening import load, recipe_for
from colonnade.launcher.train.losses import sum_losses
from colonnade.launcher.weights.convert import convert
from colonnade.parallel.world import World

BYTES = "data.tokenizer=bytes"
TEXTS = ["one", "a longer text than the others, of many words", "", "Ωmega 3", "x" * 23, "end"]
EVEN = {"mamba1_inner": 12, "s4d_inner": 12, "ffn": 12, "expert_ffn": 8, "experts": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def corpus(folder: Path) -> Path:
    """Writes the texts as JSON lines."""
    path = folder / "corpus.jsonl"
    records = [{"text": text, "question": text[:2]} for text in TEXTS]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def plain_loop(model: Any, seq_len: int, prompts: bool = False) -> dict[str, float]:
    """Loss, tokens and bytes of the texts by transformers, each piece of a document by itself."""
    nats, count, size, position = 0.0, 0, 0, 0
    total = sum(len((t[:2] * prompts + t).encode()) + 1 for t in TEXTS if t)
    for text in filter(None, TEXTS):
        before = len(text[:2].encode()) if prompts else 0
        tokens = [*((text[:2] if prompts else "") + text).encode(), 256]
        # a row ends at every multiple of seq_len; its last label is the next row's first token
        cuts = {0, len(tokens)} | {
            cut - position for cut in range(0, total, seq_len) if 0 < cut - position < len(tokens)
        }
        for start, stop in pairwise(sorted(cuts)):
            piece = torch.tensor([tokens[start:stop]])
            labels = torch.tensor(tokens[start + 1 : stop + 1], dtype=torch.long)
            with oracle.fp64(), torch.no_grad():
                logits = model(piece).logits[0, : len(labels)]
            scored = torch.arange(start + 1, start + 1 + len(labels)) >= before
            losses = cross_entropy(logits, labels, reduction="none")[scored]
            nats, count = nats + losses.sum().item(), count + int(scored.sum())
            size += int((labels[scored] != 256).sum())
        position += len(tokens)
    return {"loss": nats / count, "tokens": count, "bytes": size}


def check(report: dict[str, Any], expected: dict[str, float]) -> None:
    assert report["tokens"] == expected["tokens"]
    assert report["bytes"] == expected["bytes"]
    bits = expected["loss"] * expected["tokens"] / expected["bytes"] / math.log(2)
    figures = {
        "loss": expected["loss"],
        "perplexity": math.exp(expected["loss"]),
        "bits_per_byte": bits,
    }
    assert_equal(
        {name: torch.tensor(report[name]).double() for name in figures},
        {name: torch.tensor(value).double() for name, value in figures.items()},
    )


@pytest.mark.parametrize("prompt", [None, "question"])
@pytest.mark.parametrize(("seq_len", "batch"), [(16, 3), (7, 4), (100, 2), (64, 1)])
def test_a_loop_over_transformers(
    seq_len: int, batch: int, prompt: str | None, tmp_path: Path
) -> None:
    """Rows that end within documents, and a last row that is shorter."""
    model = llama_folder(tmp_path / "hf")
    data = corpus(tmp_path)
    report = evaluate(
        tmp_path / "hf", data, batch=batch, seq_len=seq_len, prompt=prompt, overrides=[BYTES]
    )
    check(report, plain_loop(model, seq_len, prompt is not None))
    assert report["rows"] == -(-(sum(len(t) for t in report_tokens(data, prompt)) - 1) // seq_len)


def report_tokens(data: Path, prompt: str | None) -> list[list[int]]:
    texts = [t for t in TEXTS if t]
    return [[*((t[:2] if prompt else "") + t).encode(), 256] for t in texts]


def test_a_converted_folder_and_token_files(tmp_path: Path) -> None:
    model, data = llama_folder(tmp_path / "hf"), corpus(tmp_path)
    convert(tmp_path / "hf", tmp_path / "back", "native", report=lambda line: None)
    expected = plain_loop(model, 16)
    options: dict[str, Any] = {"seq_len": 16, "overrides": [BYTES, "train.precision=fp64"]}
    check(evaluate(tmp_path / "back", data, **options), expected)
    assert main(["data", str(data), str(tmp_path / "tokens")]) == 0
    options |= {"format": "tokens"}
    check(evaluate(tmp_path / "hf", tmp_path / "tokens", **options), expected)
    options["overrides"] = []
    report = evaluate(tmp_path / "hf", tmp_path / "tokens", **options)
    assert report["bits_per_byte"] is report["bytes"] is None
    assert report["loss"] == pytest.approx(expected["loss"], rel=1e-9)


def test_several_sources_and_some_rows(tmp_path: Path) -> None:
    llama_folder(tmp_path / "hf")
    data, other = corpus(tmp_path), tmp_path / "other.txt"
    other.write_text("another text, " * 9, encoding="utf-8")
    options: dict[str, Any] = {"seq_len": 16, "overrides": [BYTES]}
    one, two = (evaluate(tmp_path / "hf", path, **options) for path in (data, other))
    both = evaluate(tmp_path / "hf", [data, other], **options)
    assert both["tokens"] == one["tokens"] + two["tokens"]
    nats = one["loss"] * one["tokens"] + two["loss"] * two["tokens"]
    assert both["loss"] == pytest.approx(nats / both["tokens"], rel=1e-12)
    assert [source["loss"] for source in both["sources"].values()] == [one["loss"], two["loss"]]
    some = evaluate(tmp_path / "hf", other, rows=2, **options)
    assert (some["rows"], some["tokens"]) == (2, 32)


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp": (2, []),
    "tp": (2, ["parallel.tp=2"]),
    "pp": (2, ["parallel.pp=2"]),
    "cp": (2, ["parallel.cp=2"]),
    "cp, heads": (2, ["parallel.cp=2", "parallel.context=ulysses", "parallel.recurrence=heads"]),
    "dp x tp": (4, ["parallel.tp=2"]),
    "hsdp x pp": (4, ["parallel.dp_replicate=2", "parallel.pp=2"]),
    "cp x tp": (4, ["parallel.cp=2", "parallel.tp=2"]),
    "interleaved": (2, ["parallel.pp=2", "parallel.schedule=interleaved"]),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid, ladder": ("M*-G*E", {"residual": "ladder"}),
    "random experts": ("*TM-*T", {"residual": "standard"}),
}


def sums_as_rank(
    rank: int, size: int, order: Order, overrides: list[str]
) -> tuple[float, int, int | None]:
    world = World(rank, size, torch.device("cpu"))
    options = [*overrides, f"train.seq_len={order.seq_len}"]
    recipe = recipe_for(Path(order.model), options, size)
    trained = load(Path(order.model), recipe, world.device, world)
    (source,) = order.sources()
    rows = open_rows(recipe, source, trained.tokenizer)
    return tuple(
        sum_losses(
            trained.passes, trained.mesh, rows, range(rows.rows), order.batch, trained.byte_lengths
        )
    )  # type: ignore[return-value]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout(name: str, layout: str, tmp_path: Path, ranks2: Ranks, ranks4: Ranks) -> None:
    """Sums of one process, whatever the number of rows of a pass and of ranks without a row."""
    pattern, fields = MODELS[name]
    size, overrides = LAYOUTS[layout]
    run = run_folder(tmp_path / "run", pattern, **EVEN, **fields)
    order = Order(str(run), (str(corpus(tmp_path)),), batch=2, seq_len=16)
    expected = evaluate(order.model, order.data, batch=3, seq_len=16)
    pool = ranks2 if size == 2 else ranks4
    for nats, tokens, size_of_text in pool.run(sums_as_rank, order, overrides):
        assert (tokens, size_of_text) == (expected["tokens"], expected["bytes"])
        assert_equal(
            {"nats": torch.tensor(nats).double()},
            {"nats": torch.tensor(expected["loss"] * expected["tokens"]).double()},
        )


def test_it_is_the_validation_of_training(tmp_path: Path, recipe: Any) -> None:
    """Full rows are those that a run validates on."""
    run = run_folder(tmp_path / "run", "*-")
    data = corpus(tmp_path)
    of_run = recipe_for(run, ["train.seq_len=16"])
    rows = open_rows(of_run, Order(str(run), (str(data),)).sources()[0], None or bytes_tokenizer())
    table = of_run.data.model_copy(
        update={
            "sources": (Order(str(run), (str(data),)).sources()[0],),
            "validation": 0.0,
            "tokenizer": "bytes",
        }
    )
    trained_on = open_data(of_run.model_copy(update={"data": table})).train
    count = trained_on.rows or 0
    assert rows.rows == count + 1
    ours = rows.batch(range(count))
    row_of = {tuple(row.tolist()): i for i, row in enumerate(ours.tokens)}
    theirs = trained_on.batch(range(count))  # in another order
    order = [row_of[tuple(row.tolist())] for row in theirs.tokens]
    assert sorted(order) == list(range(count))
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine[order], other)


def bytes_tokenizer() -> Any:
    from colonnade.launcher.data import open_tokenizer

    return open_tokenizer("bytes")


def test_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One process and two ranks report the same; the text of a report has a line a source."""
    run, data = run_folder(tmp_path / "run", "M*-", **EVEN), corpus(tmp_path)
    reports = []
    for options in (["--nproc", "2", "parallel.tp=2"], []):
        file = tmp_path / "report.json"
        arguments = ["eval", str(run), str(data), "--seq-len", "16", "--json", str(file), *options]
        assert main(arguments) == 0
        reports.append(json.loads(file.read_text()))
    assert reports[0]["layout"] == {"tp": 2}
    for name in ("loss", "perplexity", "bits_per_byte", "tokens", "rows"):
        assert reports[0][name] == pytest.approx(reports[1][name], rel=1e-9)
    capfd.readouterr()
    assert main(["eval", str(run), str(data), "--seq-len", "16", "--rows", "3"]) == 0
    header, line = capfd.readouterr().out.splitlines()
    assert header.split() == ["loss", "perplexity", "bits/byte", "tokens", "rows"]
    assert line.endswith(f"  jsonl {str(data)!r}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name the data"),
        (["none.txt"], "none.txt"),
        (["DATA", "--column", "body"], "column = 'body'"),
        (["DATA", "parallel.cp=2"], "parallel.cp = 2: does not divide the 1 ranks"),
        (["DATA", "--seq-len", "15", "--nproc", "2", "parallel.cp=2"], "train.seq_len = 15"),
        (["DATA", "model.hidden=3"], "model.hidden=3: a trained model takes"),
        (["DATA", "--seq-len", "0"], "--seq-len"),
        (["DATA", "--format", "stdlib"], "--format stdlib reads no files"),
        (["DATA", "--format", "text", "--prompt", "q"], "has no columns"),
        (["DATA", "--format", "text", "--column", "q"], "has no columns"),
        (["DATA", "--seq-len", "8", "train.seq_len=4"], "leave one of both out"),
    ],
)
def test_user_errors(
    options: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, data = run_folder(tmp_path / "run", "M*-", **EVEN), corpus(tmp_path)
    arguments = ["eval", str(run), *(str(data) if word == "DATA" else word for word in options)]
    try:
        status = main(arguments)
    except SystemExit as stop:  # of the parser
        status = int(stop.code or 0)
    assert status == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
