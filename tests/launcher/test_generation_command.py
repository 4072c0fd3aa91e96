"""The verb `generate`: Hugging Face folders, many prompts, ranks, and what it refuses."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from trained import llama_folder, run_folder

from colonnade.launcher.cli import main
from colonnade.launcher.generate import generate, opening
from colonnade.launcher.generate.opening import load, recipe_for
from colonnade.launcher.generate.run import Order, generate_texts, generate_with
from colonnade.launcher.generate.sampling import Sampling
from colonnade.launcher.train.job import build_engine
from colonnade.launcher.weights.convert import convert
from colonnade.launcher.weights.fill import fill
from colonnade.launcher.weights.source import open_weights
from colonnade.models.context import Context
from colonnade.parallel.passes import evaluating
from colonnade.parallel.world import World

CPU = torch.device("cpu")

PROMPTS = ["def f", "", "a longer prompt than the others", "x = 1", "Ω"]
BYTES = "data.tokenizer=bytes"


def texts(order: Order) -> list[tuple[str, list[int]]]:
    return [(generated.prompt, generated.tokens) for generated in generate_texts(order)]


def order_of(model: Path, batch: int = 5, temperature: float = 0.0, **fields: Any) -> Order:
    sampling = asdict(Sampling(temperature, seed=3))
    return Order(str(model), PROMPTS, 12, sampling, batch, **fields)


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """Of the folder, and of our own that it is converted to."""
    model = llama_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native", "native", report=lambda line: None)
    ours = texts(order_of(tmp_path / "hf", overrides=(BYTES,)))
    assert ours == texts(order_of(tmp_path / "native", overrides=(BYTES, "train.precision=fp64")))
    for (prompt, tokens), words in zip(ours, PROMPTS, strict=True):
        assert prompt == words
        ids = torch.tensor([list(words.encode()) or [256]])
        theirs = model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=256, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        assert tokens == (theirs[: theirs.index(256)] if 256 in theirs else theirs)


def test_a_folder_says_what_it_is_made_for(tmp_path: Path) -> None:
    llama_folder(tmp_path / "hf")
    recipe = recipe_for(tmp_path / "hf")
    assert (recipe.train.seq_len, recipe.train.precision) == (64, "fp64")
    convert(tmp_path / "hf", tmp_path / "native", "native", report=lambda line: None)
    assert recipe_for(tmp_path / "native").train.seq_len == 64


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_change_nothing(tmp_path: Path, temperature: float) -> None:
    run = run_folder(tmp_path / "run", "M*-")
    expected = texts(order_of(run, batch=1, temperature=temperature))
    assert len({tuple(tokens) for _, tokens in expected}) == len(PROMPTS)
    for batch in (2, 3, 8):
        assert texts(order_of(run, batch, temperature)) == expected
    alone = generate(run, PROMPTS[0], 12, temperature, seed=3, overrides=(BYTES,))
    assert alone == generate_texts(order_of(run, temperature=temperature))[0].text


CASES = {
    "tp": ("M*-", 2, ["parallel.tp=2"], {}),
    "tp, ladder": ("*M-*G-", 2, ["parallel.tp=2"], {"residual": "ladder"}),
    "tp, every symbol": ("*MmDGS-E", 2, ["parallel.tp=2"], {"experts": 4}),
    "pp": ("M*-D", 2, ["parallel.pp=2"], {}),
    "pp, ladder": ("*M-*G-", 2, ["parallel.pp=2"], {"residual": "ladder"}),
    "tp x pp, ladder": ("*M-*G-", 4, ["parallel.tp=2", "parallel.pp=2"], {"residual": "ladder"}),
    "fsdp": ("*M-", 2, [], {}),
    "ep": ("*E", 2, ["parallel.tp=2", "parallel.ep=2", "parallel.etp=1"], {"experts": 4}),
}
EVEN = {"mamba1_inner": 12, "s4d_inner": 12, "ffn": 12, "expert_ffn": 8}


def generate_as_rank(
    rank: int, size: int, order: Order, overrides: list[str]
) -> list[tuple[str, list[int]]]:
    """Generates in the world of a pool."""
    world, found = World(rank, size, CPU), []
    recipe = recipe_for(Path(order.model), overrides, size)
    trained = load(Path(order.model), recipe, world.device, world)
    generate_with(trained, order, found.append)
    found.sort(key=lambda generated: generated.index)
    return [(generated.prompt, generated.tokens) for generated in found]


@pytest.mark.parametrize("name", CASES)
def test_ranks_generate_the_texts_of_one_process(
    name: str, tmp_path: Path, ranks2: Ranks, ranks4: Ranks
) -> None:
    """Drawn tokens, with prompts of different lengths, past the length of training."""
    pattern, size, overrides, fields = CASES[name]
    run = run_folder(tmp_path / "run", pattern, **EVEN, **fields)
    order = order_of(run, temperature=1.0)
    expected = texts(order)
    pool = ranks2 if size == 2 else ranks4
    assert pool.run(generate_as_rank, order, overrides) == [expected] * size


def test_bf16_is_that_of_training(tmp_path: Path, ranks1: Ranks, ranks2: Ranks) -> None:
    """Matrices are narrow, decay rates and norms are not: one process is equal to FSDP2's."""
    run = run_folder(tmp_path / "run", "M*-E", **EVEN)
    alone = opening.build_alone(recipe_for(run, ["train.precision=bf16"]), CPU).model
    narrow = {name for name, p in alone.named_parameters() if p.dtype == torch.bfloat16}
    assert {name.split(".")[-1] for name in narrow} >= {"q", "out", "up", "weight"}
    wide = {name for name, p in alone.named_parameters() if p.dtype == torch.float32}
    assert any("A_log" in name for name in wide)
    assert all(".first." not in name and ".second." not in name for name in wide)
    (one,), two = ranks1.run(bf16_logits, run), ranks2.run(bf16_logits, run)
    with opening.opened(run, ["train.precision=bf16"]) as trained:
        here = logits_of(trained)
    assert torch.equal(one, here)
    assert all((t - here).abs().max() < 0.05 * here.abs().max() for t in two)


def logits_of(trained: opening.Trained) -> torch.Tensor:
    tokens = torch.arange(11)[:, None] % 7
    with torch.no_grad():
        return trained.passes.logits(tokens, Context.of_rows(tokens)).float()


def bf16_logits(rank: int, size: int, model: Path) -> torch.Tensor:
    """Logits in bf16: of one rank as training computes them, of two by tensor parallelism."""
    world = World(rank, size, CPU)
    if size == 1:
        recipe = recipe_for(model, ["train.precision=bf16"], size)
        engine = build_engine(recipe, world)
        with open_weights(model, lambda sentence: None) as weights:
            fill(engine.model, weights)
        with evaluating(engine.model):
            return logits_of(opening.Trained(recipe, engine.passes, None))
    recipe = recipe_for(model, ["train.precision=bf16", "parallel.tp=2"], size)
    return logits_of(load(model, recipe, world.device, world))


def test_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One process and two, which write the same JSON lines and print the same text."""
    run = run_folder(tmp_path / "run", "M*-", **EVEN)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS), encoding="utf-8")
    options = ["--tokens", "6", "--seed", "4", "--prompts", str(prompts)]
    lines = {}
    for nproc in ("1", "2"):
        out = tmp_path / f"{nproc}.jsonl"
        arguments = ["generate", str(run), *options, "--nproc", nproc, "--json", str(out)]
        assert main(arguments) == 0
        lines[nproc] = sorted(out.read_text(encoding="utf-8").splitlines())
    assert lines["1"] == lines["2"]
    records = [json.loads(line) for line in lines["1"]]
    assert [record["prompt"] for record in records] == PROMPTS
    assert all(set(r) == {"index", "prompt", "text", "tokens", "ended"} for r in records)
    capfd.readouterr()
    assert main(["generate", str(run), *options]) == 0
    printed = capfd.readouterr().out.removesuffix("\n").split("\n")
    assert len(printed) == len(PROMPTS)
    assert main(["generate", str(run), *options[:4], "--prompt", "def f"]) == 0
    assert capfd.readouterr().out == "def f" + records[0]["text"] + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc", "2", "parallel.cp=2"], "parallel.cp = 2: it divides sequences"),
        (["--nproc", "2", "parallel.dp_replicate=2"], "every copy of the model"),
        (["--nproc", "3"], "parallel.tp = 3: does not divide"),
        (["model.hidden=3"], "model.hidden=3: a trained model takes [parallel]"),
        (["train.steps=3"], "train.steps=3: a trained model takes [parallel]"),
        (["parallel.tpp=2"], "parallel.tpp"),
        (["parallel.tp=2"], "parallel.tp = 2: does not divide the 1 ranks"),
        (["--prompts", "none.txt"], "--prompts none.txt: cannot read it"),
        (["--json", "none/out.jsonl"], "--json none/out.jsonl: cannot write it"),
    ],
)
def test_user_errors(
    options: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, kept = run_folder(tmp_path / "run", "M*-", **EVEN), tmp_path / "kept.jsonl"
    kept.write_text("kept")
    file = [] if "--json" in options else ["--json", str(kept)]
    assert main(["generate", str(run), *options, *file]) == 2
    assert kept.read_text() == "kept"
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_folder_without_a_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    llama_folder(tmp_path / "hf")
    assert main(["generate", str(tmp_path / "hf")]) == 2
    assert "no tokenizer is known" in capfd.readouterr().err
