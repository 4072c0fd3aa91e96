"""The rank of a process, read from the environments of torchrun and srun."""

import os

import pytest

from colonnade.launcher.cluster.environment import RankEnvironment, requested_threads
from colonnade.launcher.errors import UserError

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "5", "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "n1"}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without the variables of a job, whatever the tests run under."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT", "SLURM_STEP_NUM_TASKS", *SRUN):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_variables(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


def test_a_process_without_launcher_has_no_rank(environment: pytest.MonkeyPatch) -> None:
    assert RankEnvironment.from_environment() is None


def test_torchrun_comes_before_srun(environment: pytest.MonkeyPatch) -> None:
    """As when srun starts one torchrun per host."""
    set_variables(environment, SRUN | {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    assert RankEnvironment.from_environment() == RankEnvironment(2, 4, 0, 1)


@pytest.mark.parametrize(("node", "local"), [("0", 2), ("1", 2), ("2", 1)])
def test_a_task_of_srun_is_a_rank(environment: pytest.MonkeyPatch, node: str, local: int) -> None:
    set_variables(environment, SRUN | {"SLURM_NODEID": node})
    assert RankEnvironment.from_environment() == RankEnvironment(3, 5, 1, local, from_srun=True)
    assert os.environ["MASTER_ADDR"] == "n1"
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000


@pytest.mark.parametrize(
    "values",
    [
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},  # one task of a larger allocation
        {"SLURM_STEP_ID": ""},  # a batch script
        {"SLURM_STEP_ID": "4294967290"},  # a shell that salloc gave
    ],
)
def test_one_task_is_no_rank(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    set_variables(environment, SRUN | values)
    assert RankEnvironment.from_environment() is None


def test_an_unknown_first_host_is_a_mistake(environment: pytest.MonkeyPatch) -> None:
    set_variables(environment, SRUN | {"SLURM_STEP_NODELIST": "n[1-3]", "PATH": ""})
    with pytest.raises(UserError, match="MASTER_ADDR"):
        RankEnvironment.from_environment()


@pytest.mark.parametrize(
    ("text", "threads"), [("3", 3), ("4,2", 4), ("0", None), ("", None), ("many", None)]
)
def test_requested_threads(environment: pytest.MonkeyPatch, text: str, threads: int | None) -> None:
    environment.setenv("OMP_NUM_THREADS", text)
    assert requested_threads() == threads
