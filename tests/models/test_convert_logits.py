"""`convert` folds σReparam, and compares logits with those of the source."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from equal import assert_equal
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from colonnade.launcher.checkpoint import save, step_folder
from colonnade.launcher.cli import main
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.weights import logits
from colonnade.launcher.weights.convert import convert
from colonnade.launcher.weights.fold import Folded
from colonnade.launcher.weights.hf import HuggingFaceTarget
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder

SIZES: dict[str, Any] = {
    "hidden": 24, "heads": 4, "kv_heads": 2, "ffn": 20, "vocab": 270, "sigma_reparam": True,
}  # fmt: skip
MODELS = {
    "llama": ModelConfig(pattern="*-", repeat=2, **SIZES),
    "qwen3-moe": ModelConfig(
        pattern="*-*E", experts=3, expert_ffn=12, qk_norm="head", balance=0.0, **SIZES
    ),
    "deepseek": ModelConfig(
        pattern="*-*E", experts=4, expert_ffn=12, shared_ffn=12, attention="mla", kv_rank=6,
        rope_dim=4, latent_norm_eps=1e-6, router_score="sigmoid", router_bias=True, balance=0.0,
        **SIZES,
    ),
}  # fmt: skip


def ignore(sentence: str) -> None:
    """Takes no notice."""


def run_of(config: ModelConfig, folder: Path, dtype: torch.dtype, advanced: bool = True) -> Decoder:
    """Saves a run of a model with random weights, whose singular vectors have advanced or not."""
    model = oracle.empty(config)
    for name, tensor in model.named_buffers():
        tensor.zero_() if "_left" in name or "_right" in name else tensor.normal_(0, 0.1)
    oracle.randomise(model, seed=2)
    if advanced:
        model(*inputs(config))  # a pass in training, which initialises the vectors
        for name, parameter in model.named_parameters():
            if not name.endswith("_gain"):  # from here on they are those of other weights
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_recipe(Recipe(name="run", model=config)))
    (folder / "checkpoints").mkdir()
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save(step_folder(folder / "checkpoints", 1), tensors, {"step": 1})
    return model


def inputs(config: ModelConfig) -> tuple[torch.Tensor, Context]:
    """Returns random tokens and their context."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(config.vocab, (17, 2), generator=generator)
    return tokens, Context.of_rows(tokens)


@pytest.mark.parametrize("advanced", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_sigma_reparam_becomes_plain_weights(name: str, advanced: bool, tmp_path: Path) -> None:
    """transformers' logits are those of our model in evaluation."""
    config = MODELS[name]
    model = run_of(config, tmp_path / "run", torch.float64, advanced).eval()
    lines: list[str] = []
    done = convert(tmp_path / "run", tmp_path / "hf", "hf", report=lines.append)
    assert done.logits is not None
    assert sum("σReparam is folded" in line for line in lines) == 1
    assert sum("logits of 128 random tokens" in line for line in lines) == 1
    tokens, context = inputs(config)
    with oracle.fp64(), torch.no_grad():
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **eager)
        expected = hf_model(tokens.T).logits.transpose(0, 1)
    with torch.no_grad():
        assert_equal({"logits": model(tokens, context)}, {"logits": expected})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_narrow_dtypes_are_compared_as_tightly(dtype: str, tmp_path: Path) -> None:
    run_of(MODELS["qwen3-moe"], tmp_path / "run", torch.float32)
    done = convert(tmp_path / "run", tmp_path / "hf", "hf", dtype, report=ignore)
    assert done.logits is not None
    assert done.logits < 1e-9
    done = convert(tmp_path / "run", tmp_path / "native", "native", dtype, report=ignore)
    assert done.logits is not None
    assert done.logits < 1e-9


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    oracle.randomise(model, seed=1)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("to", ["hf", "native"])
def test_other_weights_are_an_error(
    to: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder does not get its name, and the exit status is 1."""
    of_decoder = logits.of_decoder

    def wrong(weights: Any, rounded: Any, tokens: torch.Tensor) -> torch.Tensor:
        found = of_decoder(weights, rounded, tokens)
        found[3, 0] += 1e-7 * found.abs().max() * (rounded is not None)
        return found

    arguments = ["convert", str(llama), str(tmp_path / "out"), "--to", to]
    with mock.patch.object(logits, "of_decoder", wrong):
        assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "differ from those of the source by 1.0e-07 of the largest" in message
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert (tmp_path / "out").exists()


def test_a_wrong_fold_is_an_error(tmp_path: Path) -> None:
    run_of(MODELS["llama"], tmp_path / "run", torch.float32)
    factor = Folded.factor
    with (
        mock.patch.object(Folded, "factor", lambda *a: factor(*a) * (1 + 1e-6)),
        pytest.raises(logits.LogitsDifferError, match="of the model without σReparam"),
    ):
        convert(tmp_path / "run", tmp_path / "hf", "hf", report=ignore)
    assert not (tmp_path / "hf").exists()


def test_a_field_that_is_wrong_is_an_error(llama: Path, tmp_path: Path) -> None:
    """An epsilon of 2e-6 for one of 1e-6 alters logits by less than fp32's rounding."""
    init = HuggingFaceTarget.__init__

    def other(self: HuggingFaceTarget, *arguments: Any) -> None:
        init(self, *arguments)
        self.fields["rms_norm_eps"] *= 2

    with (
        mock.patch.object(HuggingFaceTarget, "__init__", other),
        pytest.raises(logits.LogitsDifferError, match="differ from those of the source"),
    ):
        convert(llama, tmp_path / "out", "hf", report=ignore)


def test_where_logits_are_not_compared(llama: Path, tmp_path: Path) -> None:
    """One line says why: transformers is absent, or lacks the class; the model is large."""
    lines: list[str] = []
    with mock.patch.dict(sys.modules, {"transformers": None}):
        done = convert(llama, tmp_path / "a", "hf", report=lines.append)
    assert done.logits is None
    assert sum("not compared: transformers is not installed" in line for line in lines) == 1
    with mock.patch.object(logits, "COMPARED", 100):
        convert(llama, tmp_path / "b", "native", report=lines.append)
    assert sum(line.endswith(" parameters, and up to 100 are") for line in lines) == 1
    with mock.patch("transformers.__version__", "4.57.1"):
        convert(llama, tmp_path / "c", "hf", report=lines.append)
    assert sum("transformers 4.57.1 is too old for Llama" in line for line in lines) == 1
