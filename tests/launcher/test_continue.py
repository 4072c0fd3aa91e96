"""Models made by transformers, trained on, exported, and read by transformers again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import fp64  # before transformers, which it keeps from packages that need a GPU
from ranks import Ranks
from test_job import job
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from colonnade.launcher.data import IndexedWriter
from colonnade.launcher.data.indexed import token_dtype
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.run import fields_of_init
from colonnade.launcher.weights.convert import convert

VOCAB, SEQ, HELD_OUT = 50, 16, 12
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))


def granite_hybrid() -> PreTrainedModel:
    hybrid = {
        "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 2,
        "mamba_chunk_size": 8, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 8, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    }  # fmt: skip
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**SHAPE | hybrid))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Token files of documents of one row each, and their tokens."""
    prefix = tmp_path_factory.mktemp("held") / "out"
    rows = torch.randint(0, VOCAB, (HELD_OUT, SEQ + 1), generator=torch.Generator().manual_seed(9))
    with IndexedWriter(prefix, token_dtype(VOCAB)) as writer:
        for row in rows:
            writer.add(row.numpy())
    return prefix, rows


@pytest.mark.parametrize("build", [llama, qwen2, granite_hybrid])
def test_a_model_is_trained_on_and_exported(
    ranks4: Ranks,
    tokens: Path,
    held_out: tuple[Path, torch.Tensor],
    tmp_path: Path,
    build: Callable[[], PreTrainedModel],
) -> None:
    """20 steps at tp=2, dp_shard=2; the loss of what transformers reads is that of the run."""
    torch.manual_seed(3)
    build().double().save_pretrained(tmp_path / "init")
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
[optimizer]
lr = 0.01
warmup = 2
[data]
packing = "whole"
[[data.sources]]
format = "tokens"
path = "{tokens}"
[[data.validation_sources]]
format = "tokens"
path = "{held_out[0]}"
[train]
init = "{tmp_path / "init"}"
steps = 20
global_batch = 8
micro_batch = 2
seq_len = {SEQ}
precision = "fp64"
[parallel]
tp = 2
dp_shard = 2
""")
    recipe = load_recipe(path, (), 4, None, fields_of_init)
    ranks4.run(job, recipe, tmp_path / "run")
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert sum("loss" in row for row in rows) == 20
    convert(tmp_path / "run", tmp_path / "out", "hf", report=lambda text: None)
    before, after = (held_out_loss(tmp_path / name, held_out[1]) for name in ("init", "out"))
    assert rows[-1]["validation_loss"] == pytest.approx(after, rel=1e-9)
    assert abs(after - before) > 1e-3


def held_out_loss(folder: Path, rows: torch.Tensor) -> float:
    """The mean loss of rows `[N, S + 1]` by transformers."""
    with torch.no_grad(), fp64():
        # its fast paths for experts have no fp64
        options = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
        logits = model.eval()(rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
