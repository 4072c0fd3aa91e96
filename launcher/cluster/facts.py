"""What a rank knows of its host, device, versions and settings, and what differs between ranks."""

import hashlib
import importlib.metadata
import importlib.util
import platform
import socket
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colonnade.launcher.cluster.environment import RankEnvironment, communication_settings
from colonnade.launcher.cluster.memory import host_id
from colonnade.launcher.cluster.network import Network, network_of_this_host

ROOMS = ("launcher", "parallel", "models", "kernels")  # packages that a job runs
UNSET = "unset"
SHOWN = 8  # hosts or ranks that a sentence names, at most


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others of itself.

    Attributes:
        rank: among all ranks.
        local_rank: among the ranks of its host.
        host: the host's name.
        host_id: differs between hosts, also where their names do not.
        device: the name of its processor.
        device_type: `cpu` or `cuda`.
        network: of its host.
        versions: by what they are versions of.
        settings: environment variables that change how ranks communicate or compute.
    """

    rank: int
    local_rank: int
    host: str
    host_id: str
    device: str
    device_type: str
    network: Network
    versions: Mapping[str, str]
    settings: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The facts as plain objects."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Facts":
        """The facts that `to_json` wrote."""
        return cls(**{**value, "network": Network.from_json(value["network"])})


def facts_of_this_rank(environment: RankEnvironment, device: torch.device) -> Facts:
    """Gathers the facts of this rank.

    Raises:
        UserError: GLOO_SOCKET_IFNAME names no interface with an address.
    """
    return Facts(
        rank=environment.rank,
        local_rank=environment.local_rank,
        host=socket.gethostname(),
        host_id=network_id(),
        device=device_name(device),
        device_type=device.type,
        network=network_of_this_host(),
        versions=versions(device),
        settings=communication_settings(),
    )


def network_id() -> str:
    """What two processes have in common on one host: the running kernel and its network."""
    name, boot = host_id()
    namespace = Path("/proc/self/ns/net")
    return f"{boot}/{namespace.stat().st_ino}" if boot and namespace.exists() else name


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the host's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def versions(device: torch.device) -> dict[str, str]:
    """The versions of all that ranks should have alike."""
    found = {
        "colonnade": f"{_installed('colonnade')} (code {code_digest()})",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "kernel": platform.release(),
    }
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        module = Path("/sys/module/nvidia/version")
        found["driver"] = module.read_text().strip() if module.exists() else "unknown"
    return found


def code_digest() -> str:
    """A digest of the files of this program: hosts may have copies of their own, of one version."""
    digest = hashlib.blake2b(digest_size=4)
    for room in ROOMS:
        spec = importlib.util.find_spec(f"colonnade.{room}")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).resolve().rglob("*.py")):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _installed(package: str) -> str:
    """The installed version of a package; `not installed` for one that is on the path alone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hosts_of(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Groups ranks by their host. Hosts that share a name are told apart by their address."""
    groups: dict[str, list[Facts]] = defaultdict(list)
    for fact in facts:
        groups[fact.host_id].append(fact)
    names = Counter(group[0].host for group in groups.values())
    labelled: dict[str, list[Facts]] = {}
    for group in groups.values():
        first = group[0]
        label = first.host
        if names[label] > 1:
            label = f"{first.host} ({first.network.used.ip})"
        if label in labelled:
            label = f"{first.host} (rank {first.rank})"
        labelled[label] = group
    return labelled


def differences(facts: Sequence[Facts]) -> list[str]:
    """Says, a sentence each, which versions, devices and settings differ between ranks."""
    hosts = hosts_of(facts)
    sentences = version_differences(facts, _names(fact.versions for fact in facts))
    if text := _difference(hosts, [fact.device for fact in facts], facts):
        sentences.append(f"devices differ: {text}; the slowest one sets the pace of a step")
    sentences += [
        f"{name} differs: {text}; set it alike on all hosts"
        for name in _names(fact.settings for fact in facts)
        if (text := _difference(hosts, [_setting(f, name) for f in facts], facts))
    ]
    return sentences


def version_differences(facts: Sequence[Facts], names: Sequence[str]) -> list[str]:
    """Says, a sentence each, which of these versions differ between ranks."""
    hosts = hosts_of(facts)
    return [
        f"{name} differs: {text}; install one version on all hosts"
        for name in names
        if (text := _difference(hosts, [f.versions.get(name, "none") for f in facts], facts))
    ]


def _setting(fact: Facts, name: str) -> str:
    """The value of a setting for comparison. Interfaces may be called differently on each host:
    of their names counts only whether they are set."""
    if name not in fact.settings:
        return UNSET
    return "set" if name.endswith("_IFNAME") else repr(fact.settings[name])


def _names(mappings: Any) -> list[str]:
    """All keys of mappings, once, in the order of their first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _difference(
    hosts: Mapping[str, Sequence[Facts]], values: Sequence[str], facts: Sequence[Facts]
) -> str:
    """Writes which ranks have which value, the most frequent one last; empty if all have one."""
    counts = Counter(values)
    if len(counts) < 2:
        return ""
    by_rank = {fact.rank: value for fact, value in zip(facts, values, strict=True)}
    ordered = sorted(counts, key=lambda value: counts[value])
    described = []
    for value in ordered:
        whole = [h for h, group in hosts.items() if all(by_rank[f.rank] == value for f in group)]
        single = [
            f"rank {fact.rank} of {host}"
            for host, group in hosts.items()
            if host not in whole
            for fact in group
            if by_rank[fact.rank] == value
        ]
        described.append(f"{value} on {enumerated([*whole, *single])}")
    return ", ".join(described)


def enumerated(names: Sequence[str]) -> str:
    """Writes names behind each other, and the number of those that would make a sentence long."""
    if len(names) <= SHOWN:
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} others"
