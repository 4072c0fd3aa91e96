"""`submit`: what it checks, what it writes, and what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_commands import SlurmCommands

from colonnade.launcher.cli import main
from colonnade.launcher.errors import UserError
from colonnade.launcher.jobs.record import read_record
from colonnade.launcher.jobs.submit import points_of, submit
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.run_files import CHECKPOINTS, JOB, JOB_ENDS, JOB_SCRIPT, RECIPE, job_log
from colonnade.launcher.train.folder import check_new_or_run

RUN = ["submit", "quickstart", "--nodes", "2", "--run", "runs/one"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_job_is_submitted_with_a_script_in_the_runs_folder(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "train.steps=20", "--time", "1:00:00", "--partition", "a100"]) == 0
    run = Path("runs/one").absolute()
    assert slurm.submitted == [f"--parsable {run / JOB_SCRIPT}"]
    script = (run / JOB_SCRIPT).read_text()
    assert "#SBATCH --partition=a100" in script
    assert "    train quickstart\n    train.steps=20\n" in script
    record = read_record(run)
    assert record is not None
    assert (record.jobs, record.template, record.nodes, record.ranks) == (
        ["101"], "preemptible", 2, 2,
    )  # fmt: skip
    printed = capsys.readouterr().out
    for said in ("101 (preemptible)", "logs 101 --follow", "Requeue=0", f"--run {run}"):
        assert said in printed


def test_the_run_may_have_what_submit_has_written(slurm: SlurmCommands) -> None:
    """Training refuses a folder with anything else."""
    assert main(RUN) == 0
    run = Path("runs/one")
    (run / job_log("101")).touch()
    (run / JOB_ENDS).touch()
    check_new_or_run(run)
    (run / "other").touch()
    with pytest.raises(UserError, match="other"):
        check_new_or_run(run)


def test_json(slurm: SlurmCommands, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--json", "-"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["jobs"] == ["101"]
    assert Path(report["script"]) == Path(report["run"]) / JOB_SCRIPT


def test_without_a_folder_the_run_is_new(slurm: SlurmCommands) -> None:
    assert main(["submit", "quickstart", "--nodes", "1"]) == 0
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"quickstart-\d{8}-\d{6}", run.name)
    assert f"#SBATCH --job-name={run.name}\n" in (run / JOB_SCRIPT).read_text()


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main([*RUN, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_checked_at_the_jobs_size_without_torch(slurm: SlurmCommands) -> None:
    code = (
        "import sys; from colonnade.launcher.cli import main; "
        "status = main(['submit', 'quickstart', 'model.heads=6', '--nodes', '3', "
        "'--ranks-per-node', '4']); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "3 nodes of 4 ranks are 12 ranks" in done.stderr
    for field in ("model.heads = 6", "train.global_batch = 16"):
        assert field in done.stderr
    assert slurm.submitted == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "preemptable"], "did you mean preemptible"),
        (["--time", "1"], "--signal-before 120"),
        (["--sweep", "train.seed=1,2"], "--sweep has no effect on the template preemptible"),
        (["--jobs", "3"], "--jobs has no effect"),
        (["--template", "single", "--max-failures", "2"], "--max-failures has no effect"),
        (["--template", "sweep"], "name what it varies"),
        (["--template", "sweep", "--sweep", "train.seed"], "give a field and its values"),
        (["--template", "sweep", "--sweep", "train.sed=1"], "train.sed"),
        (["--template", "sweep", "--sweep", "model.heads=4,6"], "model.heads = 6"),
        (["checkpoint.usr1=save"], "checkpoint.usr1 = 'save'"),
    ],
)
def test_mistakes_are_reported_before_anything_is_submitted(
    options: list[str], message: str, slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, *options]) == 2
    assert message in capsys.readouterr().err
    assert slurm.submitted == []
    assert not Path("runs").exists()


def test_a_refusal_is_shown_in_slurms_words(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.refuse("sbatch: error: invalid partition specified: nope\n")
    assert main([*RUN, "--partition", "nope"]) == 2
    error = capsys.readouterr().err
    assert error == "colonnade: sbatch refused: sbatch: error: invalid partition specified: nope\n"
    assert read_record(Path("runs/one")) is None


def test_without_slurm_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(RUN) == 2
    assert "sbatch: there is no such command on this host" in capsys.readouterr().err


def test_a_run_that_a_job_trains_is_refused(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(RUN) == 0
    script = Path("runs/one").absolute() / JOB_SCRIPT
    slurm.know("101", script, JobState="PENDING")
    assert main(RUN) == 2
    assert "job 101 trains this run, and is PENDING" in capsys.readouterr().err
    slurm.know("101", "/elsewhere/job.sbatch", JobState="PENDING")  # another cluster's number
    assert main(RUN) == 0
    slurm.know("102", script, JobState="COMPLETED")
    assert main(RUN) == 0
    assert len(slurm.submitted) == 3


def test_a_folder_with_something_else_is_refused(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/thesis.tex").touch()
    assert main(RUN) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert slurm.submitted == []


def test_a_chain_is_submitted_several_times(slurm: SlurmCommands) -> None:
    assert main([*RUN, "--template", "chain", "--jobs", "3"]) == 0
    record = read_record(Path("runs/one"))
    assert record is not None
    assert record.jobs == ["101", "102", "103"]
    assert len(set(slurm.submitted)) == 1


def test_a_chain_that_slurm_cuts_short_is_recorded(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = slurm.folder / "sbatch"
    sbatch.write_text(sbatch.read_text() + f'echo no more >"{slurm.folder}/refusal"\n')
    assert main([*RUN, "--template", "chain", "--jobs", "3"]) == 2
    assert "no more" in capsys.readouterr().err
    record = read_record(Path("runs/one"))
    assert record is not None
    assert record.jobs == ["101"]


def test_a_sweep_has_a_folder_for_each_point(slurm: SlurmCommands) -> None:
    sweep = ["--sweep", "optimizer.lr=1e-3,2e-3", "--sweep", "train.seed=1,2"]
    assert main([*RUN, "--template", "sweep", *sweep]) == 0
    run = Path("runs/one")
    record = read_record(run)
    assert record is not None
    assert record.points[1] == ["optimizer.lr=1e-3", "train.seed=2"]
    assert record.trained(run)[1] == ("101_1", run / "1")
    assert sorted(p.name for p in run.iterdir()) == ["0", "1", "2", "3", JOB, JOB_SCRIPT]


def test_points_keep_lists_whole() -> None:
    points = list(points_of(["a.b=[1,2],[3]", 'c.d="x,y"']))
    assert points == [["a.b=[1,2]", 'c.d="x,y"'], ["a.b=[3]", 'c.d="x,y"']]


def test_a_path_of_a_recipe_does_not_depend_on_the_folder(slurm: SlurmCommands) -> None:
    dry = submit("quickstart", nodes=1, dry_run=True)
    assert "train quickstart" in dry["script"]
    Path("mine.toml").write_text(dump_recipe(load_recipe("quickstart")))
    dry = submit("mine.toml", nodes=1, dry_run=True)
    assert f"train {Path.cwd()}/mine.toml" in dry["script"]
    assert re.search(r"runs/mine-\d{8}-\d{6}$", dry["run"])


def test_an_elastic_job_shrinks_to_numbers_that_fit(
    capsys: pytest.CaptureFixture[str], slurm: SlurmCommands
) -> None:
    """Two micro-batches fit one or two ranks; four fit three ranks only if the job is elastic."""
    elastic = [*RUN, "--template", "elastic", "--dry-run"]
    assert main(elastic) == 0
    assert "--nnodes=1:2" in capsys.readouterr().out
    four = [*elastic, "--nodes", "4", "train.micro_batch=4"]
    assert main(four) == 0
    printed = capsys.readouterr()
    assert "--nnodes=4:4" in printed.out
    assert "does not fit 3 nodes" in printed.err
    assert main([*four, "parallel.elastic=true"]) == 0
    assert "--nnodes=1:4" in capsys.readouterr().out
    assert main([*four, "--min-nodes", "3"]) == 2


def test_tensor_parallelism_across_nodes_is_noted(
    capsys: pytest.CaptureFixture[str], slurm: SlurmCommands
) -> None:
    assert main([*RUN, "--dry-run", "parallel.tp=2"]) == 0
    assert "parallel.tp = 2 spans nodes of 1 ranks" in capsys.readouterr().err
    assert main([*RUN, "--dry-run", "parallel.tp=2", "--ranks-per-node", "2"]) == 0
    assert "spans" not in capsys.readouterr().err


def test_a_run_is_gone_on_with(slurm: SlurmCommands) -> None:
    assert main(RUN) == 0
    (Path("runs/one") / RECIPE).touch()  # it has begun
    os.utime("runs/one")
    assert main(RUN) == 0
    record = read_record(Path("runs/one"))
    assert record is not None
    assert record.jobs == ["102"]


def test_a_run_of_another_model_is_refused(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("runs/one")
    (run / CHECKPOINTS / "step-00000002").mkdir(parents=True)
    (run / RECIPE).write_text(dump_recipe(load_recipe("quickstart", ["model.hidden=64"])))
    assert main(RUN) == 2
    assert "model.hidden" in capsys.readouterr().err
    assert slurm.submitted == []
