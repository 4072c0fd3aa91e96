"""Scripts for sbatch: what the templates make of a job's options, and which options are refused."""

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colonnade.launcher.cluster.slurm.options import JobOptions, check_options, seconds
from colonnade.launcher.cluster.slurm.script import render, template_names
from colonnade.launcher.errors import UserError

TEMPLATES = ("chain", "elastic", "preemptible", "single", "sweep")


def options(**fields: Any) -> JobOptions:
    """A job with an option of every kind."""
    given = {
        "name": "named", "recipe": "/recipes/my recipe.toml", "run": Path("/runs/it's mine"),
        "folder": Path("/work dir"), "python": "/env/bin/python", "nodes": 4, "since": 1000,
        "overrides": ["train.steps=20", 'data.path="a b"'], "ranks_per_node": 8,
        "gpus_per_node": 8, "cpus_per_rank": 3, "mem": "64G", "time": "12:00:00",
        "account": "lab", "partition": "a100", "qos": "high", "modules": ["cuda/12"],
        "lines": ["export NOTE='two words'"], "sbatch": ["--constraint=ib"],
        "points": [["optimizer.lr=1"], ["optimizer.lr=2"]],
    }  # fmt: skip
    return JobOptions(**{**given, **fields})


def headers(script: str) -> dict[str, str]:
    """The options in the lines of #SBATCH."""
    lines = re.findall(r"^#SBATCH (--[\w-]+)=?(.*)$", script, re.MULTILINE)
    assert len({name for name, _ in lines}) == len(lines)  # none is given twice
    return {name: value.strip('"') for name, value in lines}


def test_these_are_all_templates() -> None:
    assert tuple(template_names()) == TEMPLATES


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("container", [None, "image.sif", "registry/image:1"])
def test_a_script_is_sound_bash(template: str, container: str | None, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(render(template, options(container=container)), encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).stderr == b""
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert checked.stdout == ""


@pytest.mark.parametrize("template", TEMPLATES)
def test_options_stand_in_the_header(template: str) -> None:
    header = headers(render(template, options()))
    tasks = 1 if template == "elastic" else 8
    expected = {
        "--job-name": "named", "--nodes": "4", "--ntasks-per-node": str(tasks),
        "--gpus-per-node": "8", "--cpus-per-task": str(3 * 8 // tasks), "--mem": "64G",
        "--time": "12:00:00", "--account": "lab", "--partition": "a100", "--qos": "high",
        "--constraint": "ib", "--open-mode": "append",
    }  # fmt: skip
    assert expected.items() <= header.items()
    assert ("--requeue" in header) is (template in ("elastic", "preemptible", "sweep"))
    batch_shell = "" if template == "single" else "B:"  # single has no trap
    assert header["--signal"] == f"{batch_shell}USR1@120"
    assert ("--dependency" in header) is (template == "chain")
    assert header.get("--array") == ("0-1" if template == "sweep" else None)


def test_options_that_were_not_given_are_left_to_the_cluster() -> None:
    names = ("gpus_per_node", "cpus_per_rank", "mem", "time", "account", "partition", "qos")
    header = headers(render("single", options(**dict.fromkeys(names), sbatch=[])))
    assert set(header) == {
        "--job-name", "--nodes", "--ntasks-per-node", "--output", "--open-mode", "--no-requeue",
        "--signal",
    }  # fmt: skip


FAKE = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" END >>"$CALLS"
"""


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_script_gives_srun_the_words_of_the_command(template: str, tmp_path: Path) -> None:
    """Runs the script with an srun that writes down its arguments: quoting loses no word."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name in ("srun", "scontrol", "module", "python"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    job = options(
        run=tmp_path / "a run", folder=tmp_path, python=str(programs / "python"),
        lines=["export NOTE='two words'", 'echo "$NOTE" >note'], points=[["a.b=[1, 2]"]],
    )  # fmt: skip
    script = tmp_path / "job.sbatch"
    script.write_text(render(template, job), encoding="utf-8")
    variables = {
        "PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(calls), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
    }  # fmt: skip
    if template == "sweep":
        variables |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    done = subprocess.run(["bash", str(script)], env=variables, capture_output=True, text=True)
    assert "unbound variable" not in done.stderr
    assert (tmp_path / "note").read_text() == "two words\n"
    called = [call.split("\n") for call in calls.read_text().split("\nEND\n")]
    assert ["module", "load", "cuda/12"] in called
    (srun,) = (call for call in called if call[0] == "srun")
    run = f"{tmp_path}/a run" + ("/0" if template == "sweep" else "")
    words = ["train", job.recipe, *job.overrides, "--run-dir", run, "--resume", "auto"]
    words += ["a.b=[1, 2]"] if template == "sweep" else []
    assert srun[-len(words) :] == words


def test_elastic_ranges_over_nodes() -> None:
    assert "--nnodes=1:4 --nproc-per-node=8" in render("elastic", options())
    script = render("elastic", options(min_nodes=2, smallest=2))
    assert "--nnodes=2:4" in script
    assert headers(script)["--nodes"] == "2-4"


def test_sweep_may_limit_how_many_run_at_once() -> None:
    assert headers(render("sweep", options(at_once=1)))["--array"] == "0-1%1"


def test_a_template_of_the_user_has_the_shared_pieces(tmp_path: Path) -> None:
    path = tmp_path / "mine.sbatch"
    path.write_text('#!/bin/bash\n{% include "_header.sh" %}\necho {{ job.recipe | quote }}\n')
    script = render(str(path), options())
    assert headers(script)["--nodes"] == "4"
    assert shlex.split(script.splitlines()[-1]) == ["echo", "/recipes/my recipe.toml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ job.colour }}", "colour"),
        ("a\n{% include 'none.sh' %}", "none.sh"),
        ("a\nb\n{% if %}", "line 3"),
    ],
)
def test_a_faulty_template_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.sbatch"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        render(str(path), options())
    assert str(path) in str(error.value)


def test_an_unknown_template_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean preemptible"):
        render("preemptable", options())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partition": "a b"}, "--partition 'a b'"),
        ({"account": "x;y"}, "--account 'x;y'"),
        ({"name": "two words"}, "--name 'two words'"),
        ({"mem": "64 GB"}, "--mem '64 GB'"),
        ({"time": "noon"}, "--time 'noon'"),
        ({"time": "2"}, "--signal-before 120"),
        ({"signal_before": 65536}, "--signal-before 65536"),
        ({"run": Path("/a%j")}, "--run /a%j"),
        ({"min_nodes": 5}, "--min-nodes 5"),
        ({"gpus_per_node": 4}, "--ranks-per-node 8"),
        ({"lines": ["a\nb"]}, "--line"),
        ({"sbatch": ["constraint=x"]}, "--sbatch 'constraint=x'"),
        ({"sbatch": ["--nodes=3"]}, "give --nodes to submit"),
        ({"sbatch": ["-N 3"]}, "give --nodes to submit"),
    ],
)
def test_unsound_options_are_refused(fields: dict[str, Any], message: str) -> None:
    sound = replace(options(), run=Path("/runs/a"))
    check_options(sound)
    with pytest.raises(UserError) as error:
        check_options(replace(sound, **fields))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-12", 216000), ("1-0:30", 88200),
        ("1-0:0:5", 86405), ("", None), ("1:2:3:4", None), ("infinite", None),
    ],
)  # fmt: skip
def test_time_limits(time: str, expected: int | None) -> None:
    """SLURM's notations: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    assert seconds(time) == expected
