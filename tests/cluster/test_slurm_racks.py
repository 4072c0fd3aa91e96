"""The order of tasks along the racks of a real SLURM cluster whose switches it knows."""

import sys
from pathlib import Path

import pytest
from cluster.slurm_cluster import SlurmCluster, missing_for_slurm

import colonnade

SWITCHES = """\
SwitchName=rack1 Nodes=n[1,3]
SwitchName=rack2 Nodes=n[2,4]
SwitchName=core Switches=rack[1-2]
"""
TEMPLATE = r"""#!/bin/bash
{% include "_header.sh" %}
{% include "_environment.sh" %}
run={{ job.run | quote }}
{% include "_order.sh" %}
"${srun[@]}" "${order[@]}" bash -c \
    'echo "$SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $MASTER_ADDR"'
"""


def test_tasks_of_a_rack_follow_each_other(tmp_path: Path) -> None:
    if reason := missing_for_slurm():
        pytest.skip(reason)
    template = tmp_path / "order.sbatch"
    template.write_text(TEMPLATE)
    with SlurmCluster(tmp_path / "slurm", ("n1", "n2", "n3", "n4"), SWITCHES) as slurm:
        slurm.environment["PYTHONPATH"] = str(Path(colonnade.__file__).parent.parent)
        slurm.call(
            sys.executable, "-m", "colonnade.launcher", "submit", "quickstart", "--nodes", "4",
            "--ranks-per-node", "2", "train.micro_batch=1", "--template", str(template), "--run",
            str(tmp_path / "run"), cwd=tmp_path,
        )  # fmt: skip
        assert slurm.wait("1", "COMPLETED", "FAILED") == "COMPLETED"
    lines = [line.split() for line in (tmp_path / "run" / "slurm-1.out").read_text().splitlines()]
    hosts = ["n1", "n1", "n3", "n3", "n2", "n2", "n4", "n4"]
    assert sorted(lines) == [[str(i), h, str(i % 2), "n1"] for i, h in enumerate(hosts)]
