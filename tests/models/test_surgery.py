"""Weight surgery: each edit against what it should compute, by boxes and through the verb."""

import copy
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from equal import assert_equal
from test_convert import ignore, random_box, tensors_in
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from colonnade.launcher.cli import main
from colonnade.launcher.convert.huggingface.family import shapes_of
from colonnade.launcher.errors import UserError
from colonnade.launcher.weights.convert import convert
from colonnade.launcher.weights.source import Box, Weights, open_weights
from colonnade.launcher.weights.surgery import edited
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.parallel.materialise import load_decoder, new_decoder


class Memory(Weights):
    """Random weights in memory."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        small: dict[str, Any] = {"hidden": 12, "heads": 2, "ffn": 20, "vocab": 30, "init_std": 0.3}
        self.folder, self.config = folder, ModelConfig(**small | fields)
        self.shapes = shapes_of(self.config)
        model = new_decoder(self.config, seed=3, dtype=torch.float64)
        generator = torch.Generator().manual_seed(4)
        self.tensors = {
            name: t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype)
            for name, t in model.state_dict().items()
        }

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, box: Box) -> Tensor:
        return self.tensors[name][box]


def edit(source: Weights, *edits: str) -> Weights:
    with ExitStack() as stack:
        return edited(source, edits, stack, ignore)


@torch.no_grad()
def logits(weights: Weights) -> Tensor:
    """Of random tokens, by our decoder with the whole tensors."""
    tensors = {name: weights.whole(name) for name in weights.shapes}
    model = load_decoder(weights.config, tensors).double().eval()
    tokens = torch.randint(30, (9, 2), generator=torch.Generator().manual_seed(1))
    return model(tokens, Context.of_rows(tokens))


def check_boxes(weights: Weights, count: int = 6) -> None:
    """Checks that boxes of tensors are those of the whole, up to the order of a sum."""
    random = Random(5)
    for name, shape in weights.shapes.items():
        whole = weights.whole(name)
        assert whole.shape == shape, name
        for _ in range(count):
            box = random_box(shape, random)
            torch.testing.assert_close(weights.read(name, box), whole[box], rtol=1e-13, atol=1e-15)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).double().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_layers_are_dropped_and_repeated_as_in_transformers(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(llama), str(out), "--to", "hf", "--edit", "blocks=0-1,4-5,4-7"]
    assert main(["convert", *arguments]) == 0
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    layers = [copy.deepcopy(model.model.layers[index]) for index in (0, 2, 2, 3)]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(layers), 4
    made = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    tokens = torch.randint(30, (2, 11))
    with torch.no_grad():
        assert_equal({"logits": made(tokens).logits}, {"logits": model(tokens).logits})


def test_blocks_of_a_hybrid_keep_their_windows(tmp_path: Path) -> None:
    fields = {"pattern": "*-*M*-", "window": 3, "full_attention": (1,), "mamba_head_dim": 4}
    source = Memory(tmp_path, mamba_state=4, mamba_chunk=4, **fields)
    made = edit(source, "blocks=2-3,0,2,5")
    assert made.config.symbols == "*M**-"
    windows = [made.config.window_of(t) for t in (0, 2, 3)]
    assert windows == [None, 3, None]
    assert torch.equal(made.whole("blocks.3.q"), source.tensors["blocks.2.q"])
    assert torch.equal(made.whole("norms.4.weight"), source.tensors["norms.5.weight"])
    check_boxes(made)


def test_blocks_keep_the_places_of_their_norms(tmp_path: Path) -> None:
    fields = {"pattern": "*-M-", "norm_after": "*", "mamba_head_dim": 4}
    source = Memory(tmp_path, mamba_state=4, mamba_chunk=4, **fields)
    made = edit(source, "blocks=2-3,0-1")
    assert (made.config.symbols, made.config.norm_after) == ("M-*-", "*")
    assert torch.equal(made.whole("after.3.weight"), source.tensors["after.1.weight"])
    fewer = [edit(source, f"blocks={rows}").config for rows in ("0-1", "2-3")]
    assert [(c.norm_position, c.norm_after) for c in fewer] == [("after", ""), ("before", "")]
    with pytest.raises(UserError, match=r"sub-block 3 .*before.*model.norm_after = .\*"):
        edit(source, "blocks=0-1,3")


@pytest.mark.parametrize("last", ["0", "2", "all"])
def test_ladder_takes_the_weights_as_they_are(tmp_path: Path, last: str) -> None:
    source = Memory(tmp_path, pattern="*-*-")
    made = edit(source, f"ladder={last}")
    assert made.config.residual == "ladder"
    assert made.config.ladder_last == (None if last == "all" else int(last))
    assert all(torch.equal(made.whole(n), t) for n, t in source.tensors.items())
    assert torch.allclose(logits(made), logits(source), rtol=1e-12) == (last == "0")
    assert edit(made, "ladder=all").config.ladder_last is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_becomes_pre_rms_norm(tmp_path: Path, tied: bool, bias: bool) -> None:
    source = Memory(tmp_path, pattern="*-*-", norm="layer", norm_bias=bias, tied=tied)
    made = edit(source, "norm=pre_rms")
    assert (made.config.norm, made.config.tied) == ("pre_rms", False)
    assert_equal({"logits": logits(made)}, {"logits": logits(source)})
    check_boxes(made)


@pytest.mark.parametrize(
    "fields", [{}, {"activation": "relu2"}, {"activation": "polyrelu"}, {"sigma_reparam": True}],
    ids=str,
)  # fmt: skip
def test_a_dense_model_becomes_a_mixture_of_copies(tmp_path: Path, fields: dict[str, Any]) -> None:
    source = Memory(tmp_path, pattern="*-", repeat=2, **fields)
    made = edit(source, "experts=5,top_k=2")
    assert made.config.symbols == "*E*E"
    assert_equal({"logits": logits(made)}, {"logits": logits(source)})
    check_boxes(made)
    routers = [made.whole(f"blocks.{t}.router") for t in (1, 3)]
    assert all(router.std() > 0 for router in routers)
    assert not torch.equal(*routers)


def test_edits_follow_each_other(tmp_path: Path) -> None:
    source = Memory(tmp_path, pattern="*-", repeat=3)
    made = edit(source, "blocks=0-3", "experts=4,top_k=2", "ladder=2")
    assert (made.config.symbols, made.config.residual) == ("*E*E", "ladder")
    plain = edit(source, "blocks=0-3", "ladder=2")
    assert_equal({"logits": logits(made)}, {"logits": logits(plain)})


def test_an_average_is_the_mean_of_the_tensors(llama: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(llama)
    for seed in (1, 2):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).double().save_pretrained(tmp_path / str(seed))
    others = [f"average={tmp_path / str(seed)}" for seed in (1, 2)]
    convert(llama, tmp_path / "mean", "hf", edits=others, report=ignore)
    every = [tensors_in(folder) for folder in (llama, tmp_path / "1", tmp_path / "2")]
    made = tensors_in(tmp_path / "mean")
    assert made.keys() == every[0].keys()
    for name, tensor in made.items():
        expected = torch.stack([tensors[name] for tensors in every]).mean(0)
        torch.testing.assert_close(tensor, expected, rtol=1e-15, atol=1e-17)


def test_a_native_folder_is_trained_on(llama: Path, tmp_path: Path) -> None:
    """What no Hugging Face class has is written as a folder of our own."""
    out = tmp_path / "ladder"
    convert(llama, out, "native", edits=["ladder=3"], report=ignore)
    with open_weights(out, ignore) as made, open_weights(llama, ignore) as source:
        assert (made.config.residual, made.config.ladder_last) == ("ladder", 3)
        assert torch.equal(made.whole("blocks.5.up"), source.whole("blocks.5.up"))
    with pytest.raises(UserError, match="residual"):
        convert(llama, tmp_path / "no", "hf", edits=["ladder=3"], report=ignore)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("edits", "text"),
    [
        (["window=3"], "give one of ladder, blocks, norm, experts, average"),
        (["ladder=-1"], "ladder=-1: give a whole number, at least 0"),
        (["ladder=9"], "the row has 8 sub-blocks"),
        (["blocks=0-9"], "'0-9' is none of the source's sub-blocks 0 to 7"),
        (["blocks="], "is none of the source's sub-blocks"),
        (["norm=rms"], "only pre_rms"),
        (["norm=pre_rms"], "this conversion starts from layer"),
        (["experts=4"], "write it as experts=8,top_k=2"),
        (["experts=4,top_k=1"], "top_k=1: give a whole number, at least 2"),
        (["experts=4,top_k=5"], "top_k is above"),
        (["blocks=0,2", "experts=4,top_k=2"], "the model needs MLPs"),
        (["average=nowhere"], "nowhere: neither a run"),
    ],
)
def test_a_wrong_edit_is_refused_before_anything_is_written(
    llama: Path, tmp_path: Path, edits: list[str], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        convert(llama, tmp_path / "out", "native", edits=edits, report=ignore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_models_of_other_shapes_are_not_averaged(llama: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(llama)
    config.intermediate_size = 32
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    edits = [f"average={tmp_path / 'wide'}"]
    with pytest.raises(UserError, match=r"other tensors than .*llama, such as blocks\.1\.down"):
        convert(llama, tmp_path / "out", "hf", edits=edits, report=ignore)


def test_models_that_compute_something_else_are_not_averaged(llama: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(llama)
    config.rms_norm_eps = 0.1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    edits = [f"average={tmp_path / 'other'}"]
    with pytest.raises(UserError, match=r"its norm_eps is 0\.1, and that of .*llama is 1e-06"):
        convert(llama, tmp_path / "out", "hf", edits=edits, report=ignore)
