"""environment.jsonl: a line for every start, with hosts and versions, and without secrets."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from colonnade.launcher.cluster.environment import RECORDED, recorded_variables
from colonnade.launcher.cluster.secrets import masked
from colonnade.launcher.cluster.software import commit, software
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.lines import read_lines
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.order import Order
from colonnade.launcher.train.watch.starts import Place, by_host
from colonnade.parallel.world import World

CANARY = "canary8317"  # the value of every planted secret
PLANTED = {
    "SLURM_JWT": CANARY,
    "SLURM_API_TOKEN": CANARY,
    "SLURM_JOB_COMMENT": f"token {CANARY}",
    "NCCL_PASSWORD": CANARY,
    "TORCH_SECRET_KEY": CANARY,
    "WANDB_API_KEY": CANARY,
    "HF_TOKEN": CANARY,
    "AWS_SECRET_ACCESS_KEY": CANARY,
}
COMMAND = ["colonnade", "train", "tiny", "--nproc", "2", "train.steps=2", f"x.password={CANARY}"]


def job(
    rank: int, size: int, recipe: Recipe, run: Path, variables: dict[str, str], resume: bool
) -> None:
    """Runs a job with additional variables in the environment."""
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "recipe.toml").write_text(dump_recipe(recipe))
    os.environ.update(variables)
    try:
        world, until = World(rank, size, torch.device("cpu")), None if resume else 1
        run_job(recipe, run, world, resume, Order(until=until, command=COMMAND))
    finally:
        for name in variables:
            del os.environ[name]


def test_every_start_is_recorded_without_secrets(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = recipe("model.pattern=*-", "train.steps=2", "train.validate_rows=0")
    harmless = {"SLURM_JOB_ID": "17", "NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "lo"}
    ranks2.run(job, settings, tmp_path, PLANTED | harmless, False)
    ranks2.run(job, settings, tmp_path, {}, True)
    first, second = read_lines(tmp_path / "environment.jsonl", "attempt", "time")
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert harmless.items() <= first["variables"].items()
    assert not harmless.keys() & second["variables"].keys()
    ranks = [{"rank": rank, "local_rank": rank, "device": "cpu"} for rank in range(2)]
    assert first["hosts"] == {socket.gethostname(): ranks}
    assert first["command"] == [*COMMAND[:-1], "x.password=***"]
    assert first["packages"]["torch"] == importlib.metadata.version("torch")
    assert first["packages"]["colonnade"] == importlib.metadata.version("colonnade")
    assert first["python"] == ".".join(map(str, sys.version_info[:3]))
    assert first["cuda"] is None or "cuda" in first["cuda"]
    for path in tmp_path.rglob("*.jsonl"):
        assert CANARY not in path.read_text()


def test_variables_are_those_of_the_list_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name in RECORDED]:
        monkeypatch.delenv(name)
    for name, value in (PLANTED | {"CUDA_VISIBLE_DEVICES": "1,2"}).items():
        monkeypatch.setenv(name, value)
    assert recorded_variables() == {"CUDA_VISIBLE_DEVICES": "1,2"}
    for name in RECORDED:  # none whose name is that of a secret
        assert masked([f"{name}=x"]) == [f"{name}=x"]


@pytest.mark.parametrize(
    "word",
    [
        f"train.password={CANARY}",
        f"model.mup_base={{api_key = '{CANARY}, {CANARY}'}}",
        f"--hf-token={CANARY}",
        f"WANDB_API_KEY={CANARY}",
        f"SLURM_JWT={CANARY}",
        f"Authorization: Bearer {CANARY}",
        f"data.sources.0.path=https://user:{CANARY}@host/data",
        f"data.sources.0.path=https://user:p@{CANARY}@host/data",
        f"data.sources.0.path=s3://bucket/data?sig={CANARY}&x=1",
        f"train.init=hf_{CANARY}",
        f"data.tokenizer=ghp_{CANARY}",
        f"eyJhbGciOiJIUzI1NiJ9.{CANARY}",
        f"name=0123456789abcdef{CANARY}",
    ],
)
def test_what_may_be_a_secret_is_masked(word: str) -> None:
    (text,) = masked([word])
    assert CANARY not in text
    assert "***" in text


def test_the_value_of_an_option_is_masked() -> None:
    words = ["tool", "--token", CANARY, "--password", CANARY, "--key", CANARY, "run"]
    assert masked(words) == ["tool", "--token", "***", "--password", "***", "--key", "***", "run"]


def test_a_usual_command_line_stays_as_it_is() -> None:
    words = [
        "colonnade", "train", "quickstart", "--nproc", "2", "--run", "runs/quick-20261201-045032",
        "data.tokenizer=/models/llama/tokenizer.json", "model.delta_key_dim=64", "train.steps=20",
        "stage.0.tokens=1000000", "optimizer.lr=3e-4", "model.mup_base={hidden=64}", "--json", "-",
        "data.sources.0.path=s3://bucket/step-00000012", "--resume", "runs/a/checkpoints/step-10",
    ]  # fmt: skip
    assert masked(words) == words


def test_local_ranks_are_counted_on_every_host() -> None:
    places = [Place("b", "cuda:0 H200"), Place("a", "cuda:0 H200"), Place("b", "cuda:1 H200")]
    assert by_host(places) == {
        "b": [
            {"rank": 0, "local_rank": 0, "device": "cuda:0 H200"},
            {"rank": 2, "local_rank": 1, "device": "cuda:1 H200"},
        ],
        "a": [{"rank": 1, "local_rank": 0, "device": "cuda:0 H200"}],
    }


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("1")
    assert commit(file) is None  # in no checkout

    def git(*words: str) -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *name, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", "file.py")
    git("commit", "-qm", "first")
    assert commit(file) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "other").write_text("untracked, as an environment within another checkout is")
    assert commit(tmp_path / "other") is None
    assert commit(file) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    file.write_text("2")
    assert commit(file) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_software_is_json() -> None:
    assert json.loads(json.dumps(software()))["packages"]
