"""`inspect` shows what a checkpoint holds, names damaged files, and compares two."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from test_checkpoint_damage import flip
from test_job import job
from test_saves import MakeRecipe
from transformers import LlamaConfig, LlamaForCausalLM

from colonnade.launcher import checkpoint
from colonnade.launcher.checkpoint import step_folder
from colonnade.launcher.cli import main
from colonnade.launcher.errors import UserError
from colonnade.launcher.inspect.run import inspect


@pytest.fixture
def run(ranks2: Ranks, recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A run of two steps, saved after each."""
    settings = ("train.steps=2", "checkpoint.every=1", "parallel.tp=2", "train.validate_rows=0")
    ranks2.run(job, recipe(*settings), tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(run)
    assert report["checkpoint"].endswith("step-00000002")
    assert report["whole"]
    assert report["about"] | {"time": 0, "torch": ""} == {
        "step": 2, "recipe": "tiny", "ranks": 2, "time": 0, "torch": "",
        "layout": {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 2},
    }  # fmt: skip
    assert report["state"]["step"] == 2
    folder = Path(report["checkpoint"])
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    del sizes["manifest.json"]
    assert {name: file["bytes"] for name, file in report["files"].items()} == sizes
    catalog = json.loads((folder / "tensors.json").read_text())["tensors"]
    assert report["tensors"].keys() == catalog.keys()
    embedding = report["tensors"]["embedding.weight"]
    assert embedding["dtype"] == "float64"
    assert embedding["bytes"] == 8 * 50 * 16
    assert embedding["shape"] == [50, 16]
    assert main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert "layout        tp 2" in text
    assert all(f"  {name}" in text for name in sizes)
    assert "[50, 16]" in text
    assert "optimizer exp_avg of" in text


def test_every_damaged_file_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = step_folder(run / "checkpoints", 1)
    flip(folder / "rank-00001.safetensors")
    (folder / "state.json").unlink()
    assert main(["inspect", str(folder)]) == 1
    text = capsys.readouterr().out
    assert "2 of 4 files are damaged" in text
    assert "DAMAGED: its checksum differs, between bytes 0 and" in text
    assert "DAMAGED: No such file" in text
    flip(folder / "manifest.json")
    assert main(["inspect", str(folder)]) == 2
    assert "manifest.json is damaged" in capsys.readouterr().err


def test_two_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (step_folder(run / "checkpoints", step) for step in (1, 2))
    report = inspect(first, second)
    assert not report["equal"]
    assert report["state"]["step"] == [1, 2]
    assert report["about"]["step"] == [1, 2]
    found = report["differ"]["embedding.weight"]
    assert 0 < found["largest"] < 1
    assert 0 < found["elements"] <= 50 * 16
    assert main(["inspect", str(first), str(second)]) == 1
    assert "  embedding.weight: " in capsys.readouterr().out
    copy = run / "copy" / "step-00000007"
    shutil.copytree(first, copy)
    assert inspect(first, copy)["equal"]
    assert main(["inspect", str(first), str(copy)]) == 0


def test_how_tensors_differ(tmp_path: Path) -> None:
    """Names, shapes, dtypes and values, a zero's sign and a NaN among them."""
    nan = float("nan")
    one = {
        "a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(2, 3), "d": torch.ones(2),
        "e": torch.tensor([1.0, nan]), "f": torch.tensor([0.0, 3.0]), "g": torch.tensor(nan),
    }  # fmt: skip
    other = {
        "b": torch.ones(2).double(), "c": torch.ones(3, 2), "d": torch.tensor([1.0, 1.5]),
        "e": torch.tensor([1.0, 2.0]), "f": torch.tensor([-0.0, 3.0]), "g": torch.tensor(nan),
        "h": torch.zeros(()),
    }  # fmt: skip
    folders = [step_folder(tmp_path, step) for step in (1, 2)]
    for folder, tensors in zip(folders, (one, other), strict=True):
        checkpoint.save(folder, tensors, {})
    report = inspect(*folders)
    assert report["only_in_first"] == ["a"]
    assert report["only_in_second"] == ["h"]
    differ = report["differ"]
    assert differ["b"] == {
        "dtype": ["float32", "float64"], "elements": 0, "largest": 0.0, "relative": 0.0,
    }  # fmt: skip
    assert differ["c"] == {"shape": [[2, 3], [3, 2]]}
    assert differ["d"] == pytest.approx({"elements": 1, "largest": 0.5, "relative": 0.5 / 2**0.5})
    assert differ["e"] == {"not_a_number": 1}
    assert differ["f"] == {"bits_only": True}
    assert "g" not in differ
    assert report["equal_tensors"] == 1


def test_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    report = inspect(tmp_path)
    assert report["kind"] == "huggingface"
    assert report["about"] == {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert report["tensors"]["model.layers.0.self_attn.k_proj.weight"]["shape"] == [4, 8]
    assert main(["inspect", str(tmp_path), str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "model.safetensors" in text
    assert "record no checksums" in text


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="neither a checkpoint, nor a run with one, nor a Hug"):
            inspect(folder)
