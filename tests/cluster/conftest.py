"""Fixtures of hosts and of a SLURM cluster; without what they take, tests are skipped by name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.hosts import Hosts, missing_for_hosts
from cluster.slurm_cluster import SlurmCluster, missing_for_slurm


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts, n1 and n2, and the head that connects them."""
    if reason := missing_for_hosts():
        pytest.skip(reason)
    with Hosts("n1", "n2") as made:
        yield made


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A SLURM cluster of two nodes, n1 and n2, which the tests of a file share."""
    if reason := missing_for_slurm():
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder) as cluster:
        yield cluster
