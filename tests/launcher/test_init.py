"""Training that starts from weights of a Hugging Face folder or of a run, on any layout."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import RankError, Ranks
from test_checkpoint_damage import flip
from test_job import job
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from colonnade.kernels.labels import IGNORED
from colonnade.launcher.checkpoint import newest
from colonnade.launcher.convert.huggingface.folder import read_hf
from colonnade.launcher.data import open_data
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.run import fields_of_init
from colonnade.launcher.verify.plan import plan_job
from colonnade.launcher.weights.fill import fill
from colonnade.launcher.weights.source import config_in, open_weights
from colonnade.models.shapes import measure
from colonnade.parallel.world import World

MakeRecipe = Callable[..., Recipe]


def ignore(sentence: str) -> None:
    """Takes no notice."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(2)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="8KB")
    return folder


@pytest.fixture
def tokens_recipe(tokens: Path, tmp_path: Path) -> MakeRecipe:
    """A recipe without a model of its own."""
    path = tmp_path / "start.toml"
    path.write_text(f"""
name = "start"
[optimizer]
warmup = 1
[data]
validation = 0.0
[[data.sources]]
format = "tokens"
path = "{tokens}"
[train]
steps = 3
global_batch = 4
micro_batch = 2
seq_len = 16
precision = "fp64"
""")
    return lambda *overrides: load_recipe(path, overrides, None, None, fields_of_init)


def filled(
    rank: int, size: int, recipe: Recipe, init: Path, run: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Builds the model on this layout, and fills it; returns its whole tensors, and those kept."""
    model = build(recipe, run, World(rank, size, torch.device("cpu"))).model
    with open_weights(init, ignore) as weights:
        kept = fill(model, weights, recipe.train.init_only, recipe.train.init_skip)
    tensors = {
        name: t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in model.state_dict().items()
    }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, kept


def expected(init: Path) -> dict[str, Tensor]:
    """Reads whole tensors in one process, by the map that the tests of families compare."""
    return read_hf(init, ignore)[1]


@pytest.mark.parametrize(
    "layout",
    [("parallel.tp=2", "parallel.dp_shard=2"), ("parallel.pp=2", "train.micro_batch=1"),
     ("parallel.dp_replicate=2", "parallel.cp=2")],
)  # fmt: skip
def test_any_layout_is_filled(
    ranks4: Ranks, tokens_recipe: MakeRecipe, llama: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    recipe = tokens_recipe(f"train.init={llama}", *layout)
    assert recipe.model.hidden == 16
    assert recipe.model.kv_heads == 2
    results = ranks4.run(filled, recipe, llama, tmp_path)
    native = expected(llama)
    assert set().union(*(tensors for tensors, _ in results)) == set(native)
    for tensors, kept in results:
        assert kept == []
        for name, tensor in tensors.items():
            assert torch.equal(tensor, native[name].double())


def test_experts_of_their_ranks(
    ranks4: Ranks, tokens_recipe: MakeRecipe, mixtral: Path, tmp_path: Path
) -> None:
    recipe = tokens_recipe(f"train.init={mixtral}", "parallel.ep=2", "parallel.tp=2")
    native = expected(mixtral)
    for tensors, _ in ranks4.run(filled, recipe, mixtral, tmp_path):
        for name, tensor in tensors.items():
            assert torch.equal(tensor, native[name].double()), name


def test_only_and_skip(
    ranks2: Ranks, tokens_recipe: MakeRecipe, llama: Path, tmp_path: Path
) -> None:
    chosen = ('train.init_only=["blocks.*", "norm*"]', 'train.init_skip=["*.out"]')
    recipe = tokens_recipe(f"train.init={llama}", "parallel.dp_shard=2", *chosen)
    nothing = tokens_recipe(f"train.init={llama}", "parallel.dp_shard=2", 'train.init_skip=["*"]')
    random, _ = ranks2.run(filled, nothing, llama, tmp_path)[0]
    native = expected(llama)
    tensors, kept = ranks2.run(filled, recipe, llama, tmp_path)[0]
    assert "embedding.weight" in kept
    assert "blocks.0.out" in kept
    assert "blocks.0.q" not in kept
    for name, tensor in tensors.items():
        source = random[name] if name in kept else native[name].double()
        assert torch.equal(tensor, source)


def test_a_run_starts_from_weights(
    ranks2: Ranks, tokens_recipe: MakeRecipe, llama: Path, tmp_path: Path
) -> None:
    """The first loss is that of transformers on the same rows; then a run starts from this one."""
    overrides = (f"train.init={llama}", "parallel.tp=2", "optimizer.lr=1e-30")
    recipe = tokens_recipe(*overrides)
    ranks2.run(job, recipe, tmp_path / "first")
    first = read_metrics(tmp_path / "first" / "metrics.jsonl")[0]["loss"]
    batch = open_data(recipe).train.batch(range(4))
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64)
    losses, count = 0.0, 0
    for row in range(4):  # documents of a row do not see each other
        documents = batch.documents[row]
        for number in documents.unique():
            at = documents == number
            with torch.no_grad():
                logits = model(batch.tokens[row][at][None].long()).logits[0]
            labels = batch.labels[row][at].long()
            losses += float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            count += int((labels != IGNORED).sum())
    assert first == pytest.approx(losses / count, rel=1e-9)
    again = tokens_recipe(f"train.init={tmp_path / 'first'}", "optimizer.lr=1e-30")
    assert again.model == recipe.model
    ranks2.run(job, again, tmp_path / "second")
    second = read_metrics(tmp_path / "second" / "metrics.jsonl")[0]["loss"]
    assert second == pytest.approx(first, rel=1e-10)
    assert config_in(newest(tmp_path / "second" / "checkpoints") or tmp_path) == recipe.model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['train.init_skip=["blocks.7.*"]'], r"train.init_skip = 'blocks.7.\*': matches no tensor"),
        (["model.ffn=32"], r"blocks.1.down is \[16, 24\], and \[16, 32\] is needed"),
        (["model.qk_norm=head"], r"blocks.0.q_norm.*is missing.*train.init_skip"),
    ],
)
def test_what_does_not_fit_is_named(
    ranks2: Ranks, tokens_recipe: MakeRecipe, llama: Path, tmp_path: Path,
    overrides: list[str], message: str,
) -> None:  # fmt: skip
    recipe = tokens_recipe(f"train.init={llama}", *overrides)
    with pytest.raises(RankError, match=message):
        ranks2.run(filled, recipe, llama, tmp_path)


def test_other_verbs_read_the_same_recipe(
    tokens_recipe: MakeRecipe, llama: Path, tmp_path: Path
) -> None:
    """A plan, or a comparison of layouts, of a recipe that leaves its model to `train.init`."""
    model = tokens_recipe(f"train.init={llama}").model
    start = tmp_path / "start.toml"
    command = [sys.executable, "-m", "colonnade.launcher", "plan", str(start), "--gpus", "2"]
    command += ["--dry-run", f"train.init={llama}", "--json", "-"]
    planned = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["parameters"] == measure(model, 16).parameters
    job = plan_job(str(start), [f"train.init={llama}"], 2, ["tp=2"], None, 0)
    assert job.recipe.model == model


def test_sources_that_are_none(
    ranks1: Ranks, tokens_recipe: MakeRecipe, recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="neither a run with a checkpoint"):
        tokens_recipe(f"train.init={tmp_path}")
    with pytest.raises(UserError, match=r"has no effect without train\.init"):
        recipe('train.init_skip=["*"]')
    ranks1.run(job, recipe("train.steps=1"), tmp_path / "run")
    folder = newest(tmp_path / "run" / "checkpoints")
    assert folder is not None
    flip(folder / "rank-00000.safetensors")
    with pytest.raises(UserError, match="is damaged"), open_weights(folder, ignore):
        pass
    (tmp_path / "run" / "recipe.toml").unlink()
    with (
        pytest.raises(UserError, match=r"recipe\.toml is missing"),
        open_weights(folder, ignore, check=False),
    ):
        pass
