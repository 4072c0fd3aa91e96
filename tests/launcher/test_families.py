"""`colonnade train quickstart` with the pattern of each family: it runs, and learns."""

import json
from pathlib import Path

import pytest

from colonnade.launcher import generate, train

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
    "muP": ("*-M-", ["mup_base.hidden=64", "mup_base.ffn=192", "mup_base.heads=2",
                     "mup_base.kv_heads=1"]),
}  # fmt: skip

SHORT = [
    "model.repeat=1", "model.hidden=64", "train.steps=30", "train.global_batch=8",
    "train.micro_batch=4", "train.seq_len=64", "train.sample=0", "train.validate_every=0",
    "train.validate_rows=8", "optimizer.warmup=5", "optimizer.lr=5e-3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 500)


def learns(pattern: str, overrides: list[str]) -> None:
    source = ["data.sources.0.format=text", "data.sources.0.path=corpus.txt", "data.validation=0"]
    short = [o for o in SHORT if "validate" not in o] + [
        "train.validate_every=", "train.validate_rows=",
    ]  # fmt: skip
    short += ["model.ffn=96"] * ("-" in pattern)
    short += ["model.expert_ffn=64"] * ("E" in pattern or "T" in pattern)
    run = train("quickstart", [f"model.pattern={pattern}", *short, *source, *overrides])
    first, last = sum(run.losses[:3]) / 3, sum(run.losses[-3:]) / 3
    assert len(run.losses) == 30
    assert last < 0.8 * first, run.losses
    text = generate(run.path, "the quick ", tokens=8, temperature=0)
    assert text
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] is not None for row in rows)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_family_learns(pattern: str) -> None:
    learns(pattern, [])


@pytest.mark.parametrize("name", OPTIONS)
def test_options_learn(name: str) -> None:
    pattern, options = OPTIONS[name]
    learns(pattern, [f"model.{option}" for option in options])
