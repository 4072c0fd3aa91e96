"""A real SLURM cluster on one machine: a controller and nodes, each on a host of its own.

It takes root, and Debian's packages slurm-wlm, munge and iproute2.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.hosts import Hosts, environment, missing_for_hosts, wait_until

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIGURATION = """\
ClusterName=colonnade
SlurmctldHost=head(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=600
SlurmdTimeout=20
JobRequeue=1
{topology}
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_for_slurm() -> str | None:
    """Returns why this machine cannot have a SLURM cluster; None: it can."""
    if reason := missing_for_hosts():
        return reason
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else None


class SlurmCluster:
    """SLURM on hosts of this machine, for the duration of a `with` block.

    Args:
        folder: where configuration, state and logs go; every host sees it.
        names: of the nodes.
        switches: lines of topology.conf; empty: SLURM knows of no switches.
    """

    def __init__(
        self, folder: Path, names: Sequence[str] = ("n1", "n2"), switches: str = ""
    ) -> None:
        self.folder, self.hosts = folder, Hosts(*names)
        self.switches = switches
        self.daemons: list[subprocess.Popen[str]] = []
        self.environment = environment(
            SLURM_CONF=str(folder / "slurm.conf"), PATH=self._path(), OMP_NUM_THREADS="1"
        )

    @staticmethod
    def _path() -> str:
        """Returns a PATH with the folder of this Python's programs, as of `colonnade`."""
        return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def __enter__(self) -> "SlurmCluster":
        self.hosts.__enter__()
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _configure(self) -> None:
        """Writes the configuration and the key of the authentication."""
        for name in ("munge", "state"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        nodes = "\n".join(
            f"NodeName={h.name} NodeHostname={h.name} NodeAddr={h.address} CPUs=8 RealMemory=8000"
            for h in self.hosts.others
        )
        topology = "TopologyPlugin=topology/tree" if self.switches else ""
        text = CONFIGURATION.format(folder=self.folder, nodes=nodes, topology=topology)
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        if self.switches:
            (self.folder / "topology.conf").write_text(self.switches, encoding="utf-8")
        key = self.folder / "munge" / "key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)

    def _start(self) -> None:
        """Starts the daemons, in the foreground of processes that this one ends."""
        munge, head = self.folder / "munge", self.hosts.head
        self._daemon(
            head, "munged", "--force", "--foreground", f"--socket={munge}/socket",
            f"--key-file={munge}/key", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
            f"--log-file={munge}/log",
        )  # fmt: skip
        wait_until((munge / "socket").exists, 20, "munged's socket")
        self._daemon(head, "slurmctld", "-D")
        for host in self.hosts.others:
            self.start_node(host.name)
        wait_until(lambda: self._idle() == len(self.hosts.others), 60, "idle nodes of SLURM")

    def _daemon(self, host: Any, *words: str) -> None:
        """Starts a daemon on a host."""
        log = (self.folder / f"{words[0]}-{host.name}.out").open("a")
        with log:
            daemon = host.start(*words, env=self.environment, stdout=log, stderr=log)
        self.daemons.append(daemon)

    def start_node(self, name: str) -> None:
        """Starts the daemon of a node, also again after the host was killed."""
        self._daemon(self.hosts[name], "slurmd", "-D", "-N", name)

    def _idle(self) -> int:
        """Returns how many nodes are idle; 0 while the controller does not answer."""
        done = self.run("sinfo", "--noheader", "--Node", "--format=%T")
        return done.stdout.split().count("idle") if done.returncode == 0 else 0

    def run(self, *words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Runs a command on the head, as a user would on a login node."""
        options = {"env": self.environment, "timeout": 120} | options
        return self.hosts.head.run(*words, **options)

    def call(self, *words: str, **options: Any) -> str:
        """Runs a command on the head that must succeed; returns what it printed."""
        done = self.run(*words, **options)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def state(self, job: str) -> str:
        """Returns the state of a job, such as RUNNING."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job)
        return shown.partition("JobState=")[2].split()[0]

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Waits until a job is in one of the states; returns that."""

        def reached() -> str | None:
            state = self.state(job)
            return state if state in states else None

        return wait_until(reached, seconds, f"job {job} to be {' or '.join(states)}")

    def __exit__(self, *_: object) -> None:
        """Ends jobs and daemons."""
        self.hosts.__exit__()
        for daemon in self.daemons:
            daemon.wait(30)


def main() -> None:
    """`python tests/cluster/slurm_cluster.py FOLDER COMMAND …` runs a command on a cluster's head,
    such as bash."""
    folder, *words = sys.argv[1:]
    with SlurmCluster(Path(folder).absolute()) as cluster:
        subprocess.run(cluster.hosts.head.command(*words), env=cluster.environment)


if __name__ == "__main__":
    time.sleep(0)
    main()
