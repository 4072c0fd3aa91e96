"""Several hosts on one machine: network namespaces that a bridge connects, with names of their own.

```
        head  10.77.0.254 (bridge)
       /    \\
   n1 10.77.0.1   n2 10.77.0.2 …
```

Processes of a host see its network and its host name alone; they share files, processors and the
kernel with the others. It takes root, and Debian's package iproute2.
"""

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NETWORK = "10.77.0"
HEAD = "head"  # the host that has the bridge


def missing_for_hosts() -> str | None:
    """Returns why this machine cannot have hosts of its own; None: it can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "no ip or tc: apt-get install iproute2"
    probe = f"colonnade-{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    run("ip", "netns", "del", probe)
    return None


def run(*command: str) -> str:
    """Runs a command, which must succeed; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


# A host's own name, its own /etc/hosts, and the /sys of its network, in which control groups stay.
PREPARE = """
hostname "$0"
folder=$1
shift
mount --bind "$folder/hosts" /etc/hosts
mount --rbind /sys/fs/cgroup "$folder/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$folder/cgroup" /sys/fs/cgroup
exec "$@"
"""


class Host:
    """A network namespace with a host name.

    Attributes:
        name: of the host.
        address: of the host, in the network of the bridge.
        space: the name of its network namespace.
        folder: of its files, which no other host sees under their names.
        link: its network interface.
    """

    def __init__(self, name: str, number: int, prefix: str) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        self.space = f"{prefix}{name}"
        self.folder = Path("/run/colonnade-hosts") / self.space
        self.link = "br0" if name == HEAD else "eth0"
        self.port = f"to-{name}"  # the other end of its link, on the bridge

    def command(self, *words: str) -> list[str]:
        """Returns the command that runs `words` on this host."""
        entered = ["nsenter", f"--net=/run/netns/{self.space}", "unshare", "--mount", "--uts"]
        return [*entered, "sh", "-euc", PREPARE, self.name, str(self.folder), *words]

    def start(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        """Starts a process on this host; options as of `subprocess.Popen`."""
        return subprocess.Popen(self.command(*words), text=True, **options)

    def run(self, *words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Runs a command on this host, and waits for it."""
        return subprocess.run(self.command(*words), text=True, capture_output=True, **options)

    def processes(self) -> list[int]:
        """Returns the processes that run on this host."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.space).split()]

    def kill(self) -> None:
        """Kills all processes of this host at once."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has ended meanwhile
                continue


class Hosts:
    """A head and other hosts, connected by a bridge, for the duration of a `with` block.

    Args:
        names: of the hosts, without the head.
    """

    def __init__(self, *names: str) -> None:
        prefix = f"c{uuid.uuid4().hex[:5]}-"
        self.head = Host(HEAD, 254, prefix)
        self.others = [Host(name, number, prefix) for number, name in enumerate(names, start=1)]

    def __getitem__(self, name: str) -> Host:
        return next(host for host in [self.head, *self.others] if host.name == name)

    def __enter__(self) -> "Hosts":
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _up(self) -> None:
        """Makes the namespaces, the bridge, and a link of each host to it."""
        names = ["127.0.0.1 localhost"]
        names += [f"{host.address} {host.name}" for host in [self.head, *self.others]]
        for host in [self.head, *self.others]:
            run("ip", "netns", "add", host.space)
            (host.folder / "cgroup").mkdir(parents=True)
            (host.folder / "hosts").write_text("\n".join(names) + "\n", encoding="utf-8")
            run("ip", "-n", host.space, "link", "set", "lo", "up")
        space = self.head.space
        run("ip", "-n", space, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", space, "link", "set", "br0", "up")
        for host in self.others:
            run("ip", "link", "add", host.link, "netns", host.space, "type", "veth",
                "peer", "name", host.port, "netns", space)  # fmt: skip
            run("ip", "-n", space, "link", "set", host.port, "master", "br0")
            run("ip", "-n", space, "link", "set", host.port, "up")
        for host in [self.head, *self.others]:
            run("ip", "-n", host.space, "addr", "add", f"{host.address}/24", "dev", host.link)
            run("ip", "-n", host.space, "link", "set", host.link, "up")

    def limit(self, host: Host, rate: str) -> None:
        """Limits what a host sends and receives to a rate, such as `300mbit`."""
        for space, link in ((host.space, host.link), (self.head.space, host.port)):
            run("tc", "-n", space, "qdisc", "replace", "dev", link, "root", "tbf",
                "rate", rate, "burst", "256kb", "latency", "400ms")  # fmt: skip

    def cut(self, host: Host) -> None:
        """Takes a host's link down: packets to and from it are lost."""
        run("ip", "-n", self.head.space, "link", "set", host.port, "down")

    def mend(self, host: Host) -> None:
        """Takes a host's link up again."""
        run("ip", "-n", self.head.space, "link", "set", host.port, "up")

    def __exit__(self, *_: object) -> None:
        """Kills what still runs on the hosts, and removes them."""
        known = run("ip", "netns", "list").split()
        for host in [*self.others, self.head]:
            if host.space in known:
                host.kill()
                run("ip", "netns", "del", host.space)
            shutil.rmtree(host.folder, ignore_errors=True)


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Returns the first true value of a condition.

    Raises:
        TimeoutError: it stays false; the message says `what` was awaited.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds:g} s for {what}")


def environment(**variables: str) -> dict[str, str]:
    """Returns this process's environment without what a launcher of ranks sets, and with
    variables."""
    launchers = ("SLURM_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    kept = {name: v for name, v in os.environ.items() if not name.startswith(launchers)}
    return kept | variables


def torchrun(
    host: Host, arguments: Sequence[str], *, nodes: str, store: Host, port: int = 29600,
    ranks: int = 1, restarts: int = 0, **options: Any,
) -> "subprocess.Popen[str]":  # fmt: skip
    """Starts torchrun's agent on a host, with the rendezvous's store on the host `store`, which
    calls `colonnade` with arguments on each rank."""
    import sys

    conf = f"is_host={int(host is store)},join_timeout=120,last_call_timeout=2"
    conf += ",keep_alive_interval=1,keep_alive_max_attempt=3"
    return host.start(
        sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes,
        "--nproc-per-node", str(ranks), "--max-restarts", str(restarts),
        "--rdzv-backend", "c10d", "--rdzv-id", "test",
        "--rdzv-endpoint", f"{store.address}:{port}", "--rdzv-conf", conf,
        "--local-addr", host.address, "-m", "colonnade.launcher", *arguments, **options,
    )  # fmt: skip
