"""Says what software a process runs: packages, the source's commit, CUDA and its driver."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

GIT_TIMEOUT = 10.0  # seconds; a file system that is slower than that must not delay a job
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def software() -> dict[str, Any]:
    """Returns versions of the system, of Python and of all installed packages, the commit of the
    source, and CUDA's versions where there is a GPU."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": packages(),
        "source": commit(Path(__file__).resolve()),
        "cuda": cuda_versions(),
    }


def packages() -> dict[str, str]:
    """Returns the versions of all installed packages, by name; of two copies the one imported."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.name:  # what is left of a broken installation has none
            versions.setdefault(distribution.name, distribution.version)
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


def commit(file: Path) -> dict[str, Any] | None:
    """Returns the commit of the git checkout in which a file is tracked, and whether tracked files
    differ from it; None where the file is in no checkout, or git does not say."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(file.parent), *words]
        finished = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT
        )
        return finished.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # not merely a folder inside of a checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def cuda_versions() -> dict[str, str] | None:
    """Returns the versions of CUDA, NCCL and the driver; None without a usable GPU."""
    if not torch.cuda.is_available():
        return None
    versions = {"cuda": str(torch.version.cuda)}
    if torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if NVIDIA_DRIVER.exists():
        versions["driver"] = NVIDIA_DRIVER.read_text(encoding="utf-8").partition("\n")[0]
    return versions
