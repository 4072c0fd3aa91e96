"""Runs with a name: started again after kills they are one run, and two jobs never share one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import children

from colonnade import resume, train
from colonnade.launcher.checkpoint.folders import checkpoints, newest
from colonnade.launcher.cli import main
from colonnade.launcher.errors import UserError
from colonnade.launcher.train.events import read_events
from colonnade.launcher.train.metrics import read_metrics

RECIPE = [
    "quickstart", "model.pattern=M*E", "model.repeat=1", "model.hidden=16", "model.heads=2",
    "model.kv_heads=1", "model.mamba_head_dim=8", "model.ffn=", "model.expert_ffn=16",
    "train.global_batch=4", "train.micro_batch=2", "train.seq_len=32", "train.precision=fp64",
    "train.validate_every=", "train.validate_rows=", "train.sample=0", "optimizer.warmup=1",
    "data.sources.0.format=text", "data.sources.0.path=corpus.txt", "data.validation=0",
    "checkpoint.every=1", "checkpoint.keep=3",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def kill_after_checkpoints(job: subprocess.Popen[str], run: Path, count: int) -> None:
    """Kills a job's agent once `count` more checkpoints are complete; its ranks end as well."""
    before, end = step_of_newest(run), time.monotonic() + 120
    while step_of_newest(run) < before + count:
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks = children(job.pid)
    assert len(ranks) >= 2
    job.kill()
    job.communicate()
    while any(is_alive(rank) for rank in ranks):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def step_of_newest(run: Path) -> int:
    folder = newest(run / "checkpoints")
    return 0 if folder is None else int(folder.name.removeprefix("step-"))


def test_started_three_times_and_killed_twice(tmp_path: Path) -> None:
    """By torchrun, and by our launcher: one run with one curve, that of an undisturbed one."""
    recipe, run = [*RECIPE, "train.steps=60"], tmp_path / "mine"
    job = start(*TORCHRUN, "-m", "colonnade.launcher", "train", *recipe, "--run-dir", "mine")
    kill_after_checkpoints(job, run, 2)
    named = ["-m", "colonnade.launcher", "train", *recipe, "--run", "mine", "--nproc", "2"]
    job = start(*named)
    end = time.monotonic() + 60
    while not (run / ".lock").read_text().startswith(f"process {job.pid} "):
        assert time.monotonic() < end
        time.sleep(0.05)
    second = start(*named)
    assert "trains this run; wait for its end, or stop it" in second.communicate()[1]
    assert second.returncode == 2
    kill_after_checkpoints(job, run, 2)
    job = start(*named)
    assert job.wait(timeout=120) == 0, job.communicate()[1]
    undisturbed = train(recipe[0], recipe[1:], run="undisturbed")
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["loss"] for row in rows] == pytest.approx(undisturbed.losses, rel=1e-10)
    events = [event["event"] for event in read_events(run)]
    first = "first step"
    assert [event for event in events if event != "save"] == [
        "start", first, "restart", first, "restart", first, "stop"
    ]  # fmt: skip
    assert len(list(run.parent.glob("*/recipe.toml"))) == 2


def test_a_run_is_made_and_gone_on_with(capfd: pytest.CaptureFixture[str]) -> None:
    """By the same call; the end of a run is reached once."""
    overrides = [*RECIPE[1:], "train.steps=6"]
    first = train("quickstart", overrides, run="mine", until=2)
    again = train("quickstart", overrides, run="mine")
    assert first.path == again.path == Path("mine")
    assert len(again.losses) == 6
    assert again.losses == train("quickstart", overrides, run="other").losses
    assert main(["train", *RECIPE, "train.steps=6", "--run", "mine"]) == 0
    assert main(["train", "--run", "mine", "train.steps=7"]) == 0  # with its own recipe
    assert step_of_newest(Path("mine")) == 7
    capfd.readouterr()
    assert main(["train", *RECIPE, "model.hidden=32", "--run", "mine"]) == 2
    assert "model.hidden = 32: the run began with 16" in capfd.readouterr().err


def test_going_back_to_a_checkpoint() -> None:
    run = train("quickstart", [*RECIPE[1:], "train.steps=5"], run="mine")
    expected = run.losses
    back = resume(Path("mine/checkpoints/step-00000003"), until=4)
    assert back.path.absolute() == run.path.absolute()
    steps = [path.name for path in checkpoints(Path("mine/checkpoints"))]
    assert steps == ["step-00000003", "step-00000004"]
    assert resume("mine").losses == expected


def test_a_restart_does_not_go_back_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's command names a checkpoint, to which its first start went back."""
    train("quickstart", [*RECIPE[1:], "train.steps=5"], run="mine")
    resume("mine/checkpoints/step-00000003", until=4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    resume("mine/checkpoints/step-00000003")
    events = read_events(Path("mine"))
    assert [event["step"] for event in events if event["event"] == "restart"] == [3, 4]


def test_a_dry_run_of_a_run_trains_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train("quickstart", [*RECIPE[1:], "train.steps=5"], run="mine", until=2)
    capfd.readouterr()
    assert main(["train", "--run", "mine", "--dry-run"]) == 0
    assert "parameters" in capfd.readouterr().out
    assert step_of_newest(Path("mine")) == 2


def test_the_newest_whole_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    train("quickstart", [*RECIPE[1:], "train.steps=5"], run="mine")
    path = Path("mine/checkpoints/step-00000005/rank-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    capfd.readouterr()
    for arguments in (["--resume", "mine"], [*RECIPE, "train.steps=5", "--run", "mine"]):
        assert main(["train", *arguments]) == 2
        message = capfd.readouterr().err
        assert "step-00000005/rank-00000.safetensors is damaged (" in message
        assert "--resume auto" in message
    assert main(["train", "--run", "mine", "--resume", "auto"]) == 0
    assert "it is now step-00000005.aside" in capfd.readouterr().err
    assert step_of_newest(Path("mine")) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--resume", "auto"], "needs a run to choose from: add --run DIR"),
        (["quickstart", "--run", "a", "--runs", "b"], "leave one out"),
        (["--run", "absent"], "absent: no run here"),
        (["--resume", "absent/checkpoints/step-00000001"], "absent: no run here"),
        (["quickstart", "--run", "a", "--resume", "b"], "leave out --run"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    assert message in capfd.readouterr().err
    assert not Path("a").exists()


def test_a_restart_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would begin anew, and lose what the job has trained."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # also of a batch script, without ranks
    with pytest.raises(UserError, match=r"started again .*\(restart 1 so far\).*--run-dir DIR"):
        train("quickstart", RECIPE[1:])
    assert os.listdir() == ["corpus.txt"]


def test_early_requests_for_a_checkpoint_do_not_end_a_job() -> None:
    """SIGUSR1 that comes while the job starts: there is nothing to save yet."""
    before = signal.getsignal(signal.SIGUSR1)
    try:
        overrides = [*RECIPE[1:], "train.steps=2", "checkpoint.usr1=save"]
        train("quickstart", overrides, run="mine")
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_rank_whose_launcher_has_ended(tmp_path: Path) -> None:
    """It ends before it trains: nobody would wait for it."""
    arguments = (
        f'{{"run": "{tmp_path}", "resume": false, "source": [null, false], "until": null, '
        '"step": 0, "command": [], "launched": 0, "parent": 1}'
    )
    function = "colonnade.launcher.train.rank:train_started_rank"
    rank = start("-m", "colonnade.launcher", "_rank", function, arguments)
    assert "Traceback" not in rank.communicate()[1]
    assert rank.returncode in (1, -signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
