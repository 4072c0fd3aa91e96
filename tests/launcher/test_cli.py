"""The command line: exit statuses, one readable message for a user's mistake, no traceback."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colonnade import load_recipe, resume, train
from colonnade.launcher.cli import main
from colonnade.launcher.cli.parser import build_parser, parse

TINY = [
    "model.pattern=M*E",
    "model.repeat=1",
    "model.hidden=16",
    "model.heads=2",
    "model.kv_heads=1",
    "model.mamba_head_dim=8",
    "model.ffn=",
    "model.expert_ffn=16",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.seq_len=32",
    "train.validate_rows=4",
    "train.sample=5",
    "optimizer.warmup=1",
]


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of matplotlib's list of fonts, which takes it seconds to make."""
    return tmp_path_factory.mktemp("fonts")


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, fonts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes into a temporary folder, which holds the runs and the cache of a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLCONFIGDIR", str(fonts))
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)


def source(path: str = "corpus.txt") -> list[str]:
    """Returns overrides that read a text file, without validation."""
    return ["data.sources.0.format=text", f"data.sources.0.path={path}", "data.validation=0"]


def quick(*overrides: str) -> list[str]:
    """Returns arguments that train a tiny model on the corpus, without validation."""
    tiny = [o for o in TINY if not o.startswith("train.validate")]
    removed = ["train.validate_every=", "train.validate_rows="]
    return ["train", "quickstart", *tiny, *source(), *removed, *overrides]


def command(*arguments: str) -> subprocess.Popen[str]:
    """Starts `colonnade` in another process."""
    return subprocess.Popen(
        [sys.executable, "-m", "colonnade.launcher", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_a_step(process: subprocess.Popen[str]) -> None:
    """Reads the output of a process until it reports a step."""
    assert process.stdout is not None
    assert any(line.startswith("step") for line in process.stdout)


def only_run() -> Path:
    """Returns the folder of the only run."""
    (run,) = Path("runs").iterdir()
    return run


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (
        "train",
        "plan",
        "generate",
        "data",
        "submit",
        "status",
        "logs",
        "doctor",
        "bench",
    ):
        with pytest.raises(SystemExit) as exit_info:
            build_parser().parse_args([verb, "--help"])
        assert exit_info.value.code == 0
        assert verb in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("sweep", "`sweep` is planned and not built yet"),
        ("trian", "did you mean `train`?"),
        ("submt", "did you mean `submit`?"),
        ("repor", "did you mean `report`, which is planned and not built yet?"),
        ("xyzzy", "there is no verb `xyzzy`"),
    ],
)
def test_a_verb_that_does_not_exist(
    verb: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([verb])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "doctor" in error  # one of the existing verbs


def test_an_invalid_recipe_is_refused_before_torch_is_imported() -> None:
    """Importing torch takes seconds."""
    code = (
        "import sys; from colonnade.launcher.cli import main; "
        "status = main(['train', 'quickstart', 'model.heads=6']); "
        "sys.exit(status if 'torch' not in sys.modules else 1)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert process.returncode == 2


def test_train_resume_generate(capfd: pytest.CaptureFixture[str]) -> None:
    """In one process: trains, checks the files of the run, resumes it, samples text twice."""
    assert main(quick("train.steps=4", "--until", "2")) == 0
    run = only_run()
    assert "go on with" in capfd.readouterr().out
    assert main(["train", "--resume", str(run)]) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    plots = ("loss.png", "loads.png")
    for name in ("recipe.toml", *plots, "sample.txt", "checkpoints/step-00000004/state.json"):
        assert (run / name).stat().st_size > 0, name
    capfd.readouterr()
    for _ in range(2):
        assert main(["generate", str(run), "--prompt", "the ", "--tokens", "7", "--seed", "3"]) == 0
    first, second = re.findall(r"the [^\x00]{0,7}\n", capfd.readouterr().out)[:2]
    assert first == second


def test_two_ranks_and_ctrl_c() -> None:
    """SIGINT to the launcher alone: the ranks save a checkpoint to resume from."""
    process = command(*quick("train.steps=100000", "--nproc", "2"))
    wait_for_a_step(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "saved; go on with" in out
    assert "Traceback" not in err
    assert "death signal" not in err  # torchrun's message
    (checkpoint,) = (only_run() / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["step"] == int(checkpoint.name.removeprefix("step-")) > 0


def test_five_faults_are_reported_at_once() -> None:
    process = command(
        *["train", "quickstart", "model.heads=6", "train.sed=1", "optimizer.lr=-1"],
        *["model.pattern=M-*EX", "train.global_batch=7"],
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "5 mistakes" in err
    for field in (
        "model.heads",
        "train.sed",
        "optimizer.lr",
        "model.pattern",
        "train.global_batch",
    ):
        assert re.search(rf"^  {re.escape(field)} = ", err, re.MULTILINE), field
    assert "Traceback" not in err


def test_a_user_error_that_only_a_rank_can_detect(tmp_path: Path) -> None:
    """A token that the tokenizer does not have, far into a file: reported once, with status 2."""
    assert main(["data", "corpus.txt", "tokens"]) == 0
    content = bytearray(Path("tokens.bin").read_bytes())
    content[3000:3002] = (999).to_bytes(2, "little")
    Path("tokens.bin").write_bytes(content)
    Path("tokens.record.json").unlink()  # it would show that the file has changed
    overrides = ["data.sources.0.format=tokens", "data.sources.0.path=tokens", "train.steps=200"]
    overrides.append("data.tokenizer=bytes")
    process = command(*quick(*overrides, "--nproc", "2"))
    _, err = process.communicate(timeout=90)
    assert process.returncode == 2, err
    assert err.count("999") == 1
    assert "set data.tokenizer to the tokenizer that made them" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart"], "quickstart"),
        (["train"], "name a recipe"),
        (["train", "--resume", "nowhere"], "recipe.toml"),
        (["generate", "nowhere"], "neither a run with a checkpoint, nor a checkpoint"),
        (["data", "nowhere.txt", "out"], "nowhere.txt"),
        (quick("data.sources.0.path=empty.txt"), "empty.txt"),
        (quick("train.device=cuda"), "train.device"),
        (quick("data.sources.0.path=empty.txt", "--dry-run"), "empty.txt"),
    ],
)
def test_user_errors(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").touch()
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


FAILING = """
import sys
from colonnade.launcher import cli
from colonnade.launcher.cluster import ranks
from colonnade.launcher.train import loop

def fail(*_):
    raise ArithmeticError("raised by the test")

if ranks.RankEnvironment.from_environment().rank == 1:
    loop.train_step = fail
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_error_of_the_failing_rank_alone_is_reported(tmp_path: Path) -> None:
    """Under a torchrun that the user started."""
    Path("failing.py").write_text(FAILING, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = subprocess.run(
        [*run, "failing.py", *quick("parallel.dp_shard=2")],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.count("ArithmeticError: raised by the test") == 1
    assert "Connection closed" not in process.stderr


def test_other_failures_exit_with_1() -> None:
    """A killed rank: the status is not that of a user's mistake, and other ranks do not hang."""
    process = command(*quick("train.steps=100000", "parallel.tp=2", "--nproc", "2"))
    wait_for_a_step(process)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended first, with signal 9" in err
    assert time.monotonic() - start < 45


def test_options_may_come_before_overrides(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", "--nproc", "2", "train.steps=21", "--dry-run"]) == 0
    assert "dp_shard" in capfd.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "quickstart", "--nprocs", "2"])
    assert exit_info.value.code == 2


@pytest.mark.parametrize(
    "arguments", [["--resume", "RUN", "--dry-run"], ["--resume", "RUN", "--runs", "elsewhere"]]
)
def test_unused_options_are_refused(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    assert f"leave out {arguments[2]}" in capfd.readouterr().err


def test_report_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(quick("train.steps=2", "--json", "report.json")) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["step"] == 2
    assert report["run"] == str(only_run())
    assert main(["doctor", "--json", "/nowhere/report.json"]) == 2
    assert "cannot write" in capfd.readouterr().err


def test_resume_keeps_the_model_and_the_order_of_data(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A refused change leaves recipe.toml unchanged."""
    assert main(quick("train.steps=3", "--until", "1")) == 0
    run = only_run()
    recipe_text = (run / "recipe.toml").read_text()
    changes = ["model.hidden=32", "train.global_batch=8", "train.seed=4"]
    assert main(["train", "--resume", str(run), *changes]) == 2
    error = capfd.readouterr().err
    assert all(change.split("=")[0] in error for change in changes)
    assert (
        main(["train", "--resume", str(run), "train.precision=fp64"]) == 2
    )  # refused by the checkpoint
    assert (run / "recipe.toml").read_text() == recipe_text
    assert main(["train", "--resume", str(run), "optimizer.lr=0.1"]) == 0
    assert "lr = 0.1" in (run / "recipe.toml").read_text()
    assert main(["train", "--resume", str(run), "train.steps=2"]) == 2
    assert "the run is at step 3" in capfd.readouterr().err
    assert "steps = 3" in (run / "recipe.toml").read_text()


def test_tokens_train_and_validate_without_a_tokenizer(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Token files do not record their tokenizer: no bits per byte, and no sampled text."""
    Path("corpus").mkdir()
    for number in range(40):
        Path(f"corpus/{number}.txt").write_text(f"{number} green bottles\n" * 9)
    assert main(["data", "corpus", "tokens"]) == 0
    overrides = ["data.sources.0.format=tokens", "data.sources.0.path=tokens", "train.sample="]
    tiny = [o for o in TINY if o != "train.sample=5"]
    larger = ["model.vocab=1000", "train.steps=2", "train.validate_every=1", "data.validation=0.2"]
    assert main(["train", "quickstart", *tiny, *overrides, *larger]) == 0
    rows = [json.loads(line) for line in (only_run() / "metrics.jsonl").open()]
    assert any("validation_loss" in row for row in rows)
    assert not any("validation_bits_per_byte" in row for row in rows)
    assert main(["generate", str(only_run())]) == 2
    assert "data.tokenizer" in capfd.readouterr().err


def test_every_command_of_the_readme_is_valid(capfd: pytest.CaptureFixture[str]) -> None:
    """All commands in the README parse, and those that train pass a dry run."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = re.findall(r"^\.venv/bin/colonnade ([^#\n]*)", readme, re.MULTILINE)
    Path("mine.toml").write_text(re.findall(r"^# mine.toml.*?(?=^```)", readme, re.M | re.S)[0])
    without_model = re.sub(
        r"^\[model\].*?(?=^\[)", "", Path("mine.toml").read_text(), flags=re.M | re.S
    )
    Path("tune.toml").write_text(without_model)
    config = LlamaConfig(vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("path/of/a/model")
    assert len(lines) >= 6
    for words in map(shlex.split, lines):
        parse(words)
        if words[0] == "train" and "--resume" not in words:
            dry = [] if "--dry-run" in words else ["--dry-run"]
            assert main([*words, *dry]) == 0, words


def test_a_dry_run_counts_parameters_without_building_the_model(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The published size of the 8B hybrid is 8.66 B parameters; the data need not exist."""
    assert main(["train", "mamba2-hybrid-8b", "--dry-run", "--nproc", "8", "--json", "-"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["parameters"] == pytest.approx(8.66e9, rel=0.01)
    assert report["training FLOPs per token"] > 6 * report["parameters"] * 0.85
    assert not Path("runs").exists()


def test_the_python_functions_train_and_resume() -> None:
    """Two equal runs with deterministic operators, TensorBoard and a batch ramp; one resumes."""
    overrides = ["train.steps=4", "train.deterministic=true", "train.tensorboard=true"]
    overrides += ["train.ramp_batch=2", "train.ramp_steps=2", "optimizer.schedule=wsd"]
    overrides += ["optimizer.decay=2", "train.precision=bf16", "train.recompute=selective"]
    try:
        first, second = (train("quickstart", quick(*overrides)[2:]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.losses == second.losses
    assert len(first.losses) == 4
    assert first.path != second.path
    assert [row["tokens"] for row in first.metrics if "lr" in row] == [64, 64, 128, 128]
    assert any((first.path / "tensorboard").iterdir())
    saved = load_recipe(first.path / "recipe.toml")
    assert saved.train.ramp_batch == 2
    resumed = resume(first.path, ["train.steps=6", "optimizer.decay=3"])
    assert len(resumed.losses) == 6


@pytest.mark.slow
def test_under_torchrun() -> None:
    """Started by torchrun: the run succeeds, and every rank that finds a user error reports it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [*torchrun, "-m", "colonnade.launcher", *quick("train.steps=2")]
    process = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    written = list(only_run().glob("checkpoints/*/rank-*.safetensors"))
    assert len(written) == 2
    assert {path.stat().st_mode for path in written} == {
        (only_run() / "recipe.toml").stat().st_mode
    }
    process = subprocess.run(
        [*words, "train.seq_len=0"], capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert "train.seq_len = 0" in process.stderr
