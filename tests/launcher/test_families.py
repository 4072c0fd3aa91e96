"""`colonnade train quickstart` with the pattern of each family: it runs, and learns."""

import math
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from colonnade.launcher.data import IndexedWriter
from colonnade.launcher.data.indexed import token_dtype
from colonnade.launcher.generate import generate
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.metrics import read_metrics
from colonnade.parallel.world import World

PATTERNS = ("*-*-", "M-M-", "m-m-", "D-D-", "G-G-", "*E*E", "*T*T", "M-*E")

OPTIONS = {
    "latent attention": ("*-*-", ["attention=mla", "kv_heads=", "kv_rank=32", "rope_dim=16"]),
    "steered routing": (
        "*E*E",
        ["router_score=sigmoid", "router_bias=true", "router_groups=2", "router_top_groups=1",
         "balance=0.0", "shared_ffn=64", "capacity=1.2"],
    ),
    "shared depth": ("*E", ["repeat=4", "share=true"]),
    "mixed spans, parallel": (
        "*-*-", ["residual=parallel", "window=16", "full_attention=[1]", "qk_norm=head"],
    ),
    "further tokens": ("*-M-", ["mtp=2", "logit_z=1e-4", "logit_cap=30.0"]),
    "polynomials, norms on both sides": ("*-*-", ["activation=polynorm", "norm_position=both"]),
    "centred stream, σReparam": ("*-G-", ["norm=pre_rms", "norm_bias=true", "sigma_reparam=true"]),
    "muP": ("*-M-", ["mup_base.hidden=32", "mup_base.ffn=48"]),
}  # fmt: skip

SHORT = [
    "model.repeat=1", "model.hidden=64", "train.steps=30", "train.global_batch=8",
    "train.micro_batch=4", "train.seq_len=64", "train.sample=0", "train.validate_every=",
    "train.validate_rows=", "optimizer.warmup=5", "optimizer.lr=5e-3", "data.validation=0",
    "data.sources.0.format=tokens", "data.tokenizer=bytes",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that a little model learns in a few steps."""
    prefix = tmp_path_factory.mktemp("tokens") / "fox"
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog\n"))
    with IndexedWriter(prefix, token_dtype(264)) as writer:
        for length in range(100, 300):
            writer.add(text.repeat(8)[:length].numpy())
    return prefix


def job(rank: int, size: int, recipe: Recipe, run: Path) -> int:
    """One rank of a job."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").write_text(dump_recipe(recipe))
    return run_job(recipe, run, World(rank, size, torch.device("cpu")))


def learns(ranks1: Ranks, corpus: Path, run: Path, pattern: str, options: list[str]) -> None:
    overrides = [f"model.pattern={pattern}", f"data.sources.0.path={corpus}", *SHORT, *options]
    overrides += ["model.ffn=96"] * ("-" in pattern)
    overrides += ["model.expert_ffn=64"] * ("E" in pattern or "T" in pattern)
    ranks1.run(job, load_recipe("quickstart", overrides, 1), run)
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    assert len(losses) == 30
    assert all(math.isfinite(row["grad_norm"]) for row in rows)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
    assert generate(run, "the quick ", tokens=8, temperature=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_family_learns(ranks1: Ranks, corpus: Path, tmp_path: Path, pattern: str) -> None:
    learns(ranks1, corpus, tmp_path / "run", pattern, [])


@pytest.mark.parametrize("name", OPTIONS)
def test_options_learn(ranks1: Ranks, corpus: Path, tmp_path: Path, name: str) -> None:
    pattern, options = OPTIONS[name]
    learns(ranks1, corpus, tmp_path / "run", pattern, [f"model.{option}" for option in options])
