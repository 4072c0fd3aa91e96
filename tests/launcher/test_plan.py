"""The verb `plan`: one rank of a job of any size, run without data."""

import json
import subprocess
import sys
from typing import Any

import pytest
from ranks import Ranks

from colonnade.launcher.cli import main
from colonnade.launcher.errors import UserError
from colonnade.launcher.plan.run import plan, typical_rank
from colonnade.launcher.plan.table import size, table
from colonnade.parallel.config import ParallelConfig

TINY = [
    "model.pattern=*E", "model.repeat=1", "model.hidden=32", "model.expert_ffn=32",
    "model.experts=8", "train.seq_len=32", "train.micro_batch=1", "train.global_batch=64",
]  # fmt: skip


def test_from_the_command_line() -> None:
    """64 ranks: JSON alone on stdout."""
    layout = ["parallel.tp=2", "parallel.ep=8", "parallel.dp_replicate=2"]
    command = [sys.executable, "-m", "colonnade.launcher", "plan", "quickstart", "--gpus", "64"]
    command += ["--dry-run", *TINY, *layout, "--json", "-"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["layout"] == {
        "dp_replicate": 2, "dp_shard": 16, "tp": 2, "edp": 2, "ep": 8, "etp": 2,
    }  # fmt: skip
    assert report["micro_batches"] == 2
    memory = report["memory"]
    assert memory["parameters"] == memory["gradients"] == memory["optimizer"] // 2
    passes = memory["activations"] + memory["gathered"]
    assert memory["peak"] == 4 * memory["parameters"] + max(passes, memory["update"])
    by_axis = {(row["axis"], row["collective"]): row for row in report["collectives"]}
    exchange = by_axis["ep", "all_to_all"]
    # 32 tokens of two choices, 7/8 of them to other ranks, there and back, forward and backward;
    # and the numbers of rows of the one expert of each rank; two micro-batches
    assert exchange["bytes"] == 2 * (4 * 32 * 2 * 32 * 4 * 7 // 8 + 8 * 7)
    assert exchange["calls"] == 2 * 5
    (once,) = (row for row in report["per_step"] if row["axis"] == "dp_replicate"
               and row["collective"] == "all_reduce")  # fmt: skip
    assert by_axis["dp_replicate", "all_reduce"] == once
    text = table(report)
    assert "64 ranks" in text
    assert "layout: dp_replicate 2, dp_shard 16, tp 2, edp 2, ep 8, etp 2" in text
    assert f"{exchange['bytes']:,}" in text
    assert f"{memory['peak']:,}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstrt", "--gpus", "8", "--dry-run"], "did you mean quickstart?"),
        (["quickstart", "--gpus", "8"], "add --dry-run"),
        (["quickstart", "--gpus", "6", "--dry-run", "parallel.tp=4"], "not divide the 6 ranks"),
        (["quickstart", "--gpus", "8", "--dry-run", "parallel.pp=16"], "parallel.pp = 16"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is built."""
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_pipeline() -> None:
    """A report for each of its ranks; that of the first holds the most micro-batches."""
    layout = ["parallel.pp=2", "parallel.tp=2", "model.repeat=2", "train.global_batch=8"]
    command = [sys.executable, "-m", "colonnade.launcher", "plan", "quickstart", "--gpus", "8"]
    command += ["--dry-run", *TINY, *layout, "--json", "-"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["layout"] == {"pp": 2, "dp_shard": 2, "tp": 2}
    assert [stage["in_flight"] for stage in report["stages"]] == [2, 1]
    for stage in report["stages"]:
        sent = {(row["axis"], row["collective"]): row for row in stage["per_micro_batch"]}
        # 32 tokens of 32 channels in fp32, of which a tensor-parallel rank has half: stream and
        # pending output of a ladder, the input of the second stage, or their gradients
        assert sent["pp", "send"]["bytes"] == 2 * (32 * 32 * 4 // 2)
        assert sent["pp", "send"]["calls"] == 2
        once = {row["axis"] for row in stage["per_step"] if row["collective"] == "reduce_scatter"}
        assert any("dp_shard" in axis for axis in once)
    text = table(report)
    assert "schedule: 1f1b" in text
    assert "rank of the pipeline" in text


def test_all_mistakes_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["parallel.tp=3", "model.experts=7", "parallel.ep=2", "train.lr=1"]
    assert main(["plan", "quickstart", "--gpus", "4096", "--dry-run", *wrong]) == 2
    message = capsys.readouterr().err
    assert all(f in message for f in ("parallel.tp = 3", "parallel.ep = 2", "train.lr"))


@pytest.mark.parametrize("gpus", ["0", "x", None])
def test_the_number_of_ranks(gpus: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    option = [] if gpus is None else ["--gpus", gpus]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "quickstart", "--dry-run", *option])
    assert ended.value.code == 2
    assert "--gpus" in capsys.readouterr().err


def plan_on_a_rank(rank: int, size: int) -> str:
    try:
        plan("quickstart", TINY, gpus=8)
    except UserError as error:
        return str(error)
    return ""


def test_a_process_with_ranks(ranks1: Ranks) -> None:
    assert "a process of its own" in ranks1.run(plan_on_a_rank)[0]


def test_the_rank_that_is_run() -> None:
    """It has a neighbour on both sides of its segment, and the first shard of everything else."""
    assert typical_rank(ParallelConfig(tp=8), 4096) == 0
    assert typical_rank(ParallelConfig(tp=2, cp=8, dp_replicate=4), 4096) == 4 * 2


def test_sizes() -> None:
    sizes: dict[int, Any] = {0: "0 B", 1023: "1,023 B", 2048: "2.0 KiB", 5 * 2**40: "5.0 TiB"}
    assert {n: size(n) for n in sizes} == sizes
