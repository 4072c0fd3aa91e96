"""Hugging Face folders: reads those that transformers writes, and it reads those written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from equal import assert_equal
from oracle import run_hf
from safetensors.torch import load_file, save_file
from test_hf_dense import llama, olmo2, qwen3
from test_hf_moe import deepseek, mixtral, qwen3_moe
from torch import Tensor

from colonnade.launcher.convert.huggingface.families import FAMILIES
from colonnade.launcher.convert.huggingface.folder import CONFIG, INDEX, SINGLE, read_hf, write_hf
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.unused import without_unused
from colonnade.models.config import ModelConfig

BUILDS: list[Callable[..., Any]] = [llama, qwen3, olmo2, mixtral, qwen3_moe, deepseek]
each = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
SHARD = 20_000  # bytes: a handful of files


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b
    )


@each
@pytest.mark.parametrize("shard", [SHARD, 10**9], ids=["shards", "one-file"])
def test_reading_a_folder_that_transformers_wrote(build: Any, shard: int, tmp_path: Path) -> None:
    hf_model = build().to(torch.bfloat16)
    oracle.randomise(hf_model, seed=1)
    hf_model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).exists() == (shard == SHARD)

    config, native = read_hf(tmp_path)
    assert config == without_unused(oracle.native_config(hf_model))
    expected = oracle.in_native_names(hf_model.state_dict(), config, hf_model, state=True)
    assert same_bits(native, expected)


@each
@pytest.mark.parametrize("shard", [SHARD, 10**9], ids=["shards", "one-file"])
def test_transformers_reads_a_written_folder(build: Any, shard: int, tmp_path: Path) -> None:
    hf_model = build()
    config = oracle.native_config(hf_model)
    native = oracle.with_random_weights(config, hf_model, seed=2).state_dict()
    folder = tmp_path / "new"
    write_hf(folder, config, native, shard_bytes=shard)
    assert sorted(tmp_path.iterdir()) == [folder]
    assert (folder / INDEX).exists() == (shard == SHARD)

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with oracle.fp64():
        loaded, report = type(hf_model).from_pretrained(folder, output_loading_info=True, **eager)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, _ = oracle.data(config.vocab, seed=0)
    with torch.no_grad():
        logits = [{"logits": run_hf(model, tokens).logits} for model in (loaded, hf_model)]
    assert_equal(*logits)

    read_config, read_tensors = read_hf(folder)
    assert read_config == without_unused(config)
    assert same_bits(read_tensors, dict(native))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns the folder of a Llama in several files."""
    llama().save_pretrained(tmp_path, max_shard_size=SHARD)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weight_map(folder: Path) -> dict[str, str]:
    """Returns the file of each tensor, by the index."""
    return json.loads((folder / INDEX).read_text())["weight_map"]


def assert_refused(folder: Path, *words: str) -> None:
    """Checks that reading a folder is refused in one message with all these words."""
    with pytest.raises(UserError) as caught:
        read_hf(folder)
    for word in words:
        assert word in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere", CONFIG)
    assert_refused(tmp_path, CONFIG)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", '"text"'])
@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_bad_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert_refused(folder, name, "JSON")


def test_architectures(folder: Path) -> None:
    edit(folder / CONFIG, architectures=["LamaForCausalLM"])
    assert_refused(folder, "LamaForCausalLM", "LlamaForCausalLM")
    edit(folder / CONFIG, architectures=["BertModel"])
    assert_refused(folder, "BertModel", "architectures")
    for value in (None, [], "LlamaForCausalLM", ["LlamaForCausalLM", "LlamaModel"]):
        edit(folder / CONFIG, architectures=value)
        assert_refused(folder, "architectures", repr(value), "LlamaForCausalLM")


def test_unsupported_fields(folder: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "factor": 2.0}
    edit(folder / CONFIG, rope_parameters=rope)
    assert_refused(folder, "rope_type", "'longrope'", "yarn")
    edit(folder / CONFIG, rope_parameters=None, attention_dropout=0.1)
    assert_refused(folder, "attention_dropout = 0.1")


def test_a_missing_shard(folder: Path) -> None:
    names = sorted(set(weight_map(folder).values()))
    (folder / names[1]).unlink()
    (folder / names[2]).unlink()
    assert_refused(folder, names[1], names[2], "missing")


def test_a_broken_shard(folder: Path) -> None:
    name = min(weight_map(folder).values())
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert_refused(folder, name, "fetch it again")


def test_no_tensors(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert_refused(folder, SINGLE, INDEX)
    (folder / SINGLE).write_bytes(b"")
    assert_refused(folder, SINGLE, "fetch it again")
    (folder / INDEX).write_text("{}")
    assert_refused(folder, SINGLE, INDEX, "both")
    (folder / SINGLE).unlink()
    assert_refused(folder, INDEX, "weight_map")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    assert_refused(folder, INDEX, "../x.safetensors")


def test_index_and_files_disagree(folder: Path) -> None:
    files = weight_map(folder)
    edit(folder / INDEX, weight_map=files | {"model.extra": min(files.values())})
    assert_refused(folder, INDEX, "model.extra", min(files.values()))
    name = max(files)
    edit(folder / INDEX, weight_map={n: f for n, f in files.items() if n != name})
    assert_refused(folder, INDEX, name)


def change(folder: Path, name: str, update: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors of the file that holds `name`, and the index accordingly."""
    files = weight_map(folder)
    file = files[name]
    tensors = load_file(folder / file)
    update(tensors)
    save_file(tensors, folder / file)
    others = {n: f for n, f in files.items() if f != file}
    edit(folder / INDEX, weight_map=others | dict.fromkeys(tensors, file))


NAME = "model.layers.1.self_attn.k_proj.weight"


def test_a_missing_tensor(folder: Path) -> None:
    change(folder, NAME, lambda tensors: tensors.pop(NAME))
    assert_refused(folder, NAME, "missing", "(16, 20)")


def test_an_unexpected_tensor(folder: Path) -> None:
    bias = NAME.replace("weight", "bias")
    change(folder, NAME, lambda tensors: tensors.update({bias: torch.ones(16)}))
    assert_refused(folder, bias, "(16,)", "LlamaForCausalLM")


def test_a_wrong_shape(folder: Path) -> None:
    change(folder, NAME, lambda tensors: tensors.update({NAME: torch.ones(16, 21)}))
    assert_refused(folder, NAME, "(16, 21)", "(16, 20)")


def test_quantized_weights(folder: Path) -> None:
    eight_bits = torch.ones(16, 20).to(torch.float8_e4m3fn)
    change(folder, NAME, lambda tensors: tensors.update({NAME: eight_bits}))
    assert_refused(folder, NAME, "float8_e4m3fn")


def test_a_config_may_count_mtp_modules_that_the_folder_lacks(tmp_path: Path) -> None:
    hf_model = deepseek(num_mtp_layers=1)
    hf_model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["num_nextn_predict_layers"] == 1
    config, _ = read_hf(tmp_path)
    assert config.mtp == 0


def test_write_refuses(tmp_path: Path) -> None:
    config = ModelConfig(pattern="*-", vocab=11, hidden=8, heads=2, ffn=6)
    native = oracle.empty(config).state_dict()
    with pytest.raises(UserError, match="exists"):
        write_hf(tmp_path, config, native)
    new = tmp_path / "new"
    with pytest.raises(UserError, match="qk_norm = 'none'"):
        write_hf(new, config, native, family="Qwen3ForCausalLM")
    with pytest.raises(UserError, match=r"near names: .*LlamaForCausalLM"):
        write_hf(new, config, native, family="LamaForCausalLM")
    with pytest.raises(UserError, match=r"residual = 'ladder': .* nearest, LlamaForC"):
        write_hf(new, config.model_copy(update={"residual": "ladder"}), native)
    short = {n: t for n, t in native.items() if n != "final.weight"}
    with pytest.raises(UserError, match=r"final\.weight = 'missing'"):
        write_hf(new, config, short)
    with pytest.raises(UserError, match=r"extra"):
        write_hf(new, config, native | {"extra": torch.ones(1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "symbols", ["*-*-", "M-M-", "m-m-", "D-D-", "G-G-", "*E*E", "*T*T", "M-*E"]
)
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_family_names_a_field_that_it_cannot_represent(
    symbols: str, architecture: str
) -> None:
    """For any pattern the error names a field; it is never another exception."""
    family = FAMILIES[architecture]
    config = ModelConfig(pattern=symbols, residual="ladder")
    with pytest.raises(ValueError, match=" = ") as caught:
        family.config_to_hf(config)
    assert type(caught.value).__name__ == "Unsupported"
