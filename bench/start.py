"""`bench start`: seconds from a command to its first step, and from a killed rank to the next step.

Two ranks train quickstart on this host. The reference, alternating with it, is torchrun with two
ranks that import the same parts of PyTorch, open a process group, pass a barrier and end. The floor
of a first step is one process's imports, and the process group, by which torchrun's ranks take
longer than their imports.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from colonnade.launcher.run_files import METRICS
from colonnade.launcher.train.events import read_events
from colonnade.launcher.train.metrics import read_metrics

RANKS = 2
FIELDS = ["train.validate_rows=0", "train.sample=0"]
IMPORTS = (
    "import torch, torch.distributed.fsdp, torch.distributed.tensor, numpy, pydantic, safetensors, "
    "torch.distributed.pipelining, torch.distributed.checkpoint, spmd_types"
)
GROUP = f"""
import time; begin = time.time()
{IMPORTS}
import torch.distributed as dist; imported = time.time()
dist.init_process_group("gloo"); dist.barrier(); opened = time.time()
if dist.get_rank() == 0: print(imported - begin, opened - imported)
dist.barrier(); dist.destroy_process_group()
"""


def run(rounds: int = 3) -> dict[str, Any]:
    """Medians of some rounds, in seconds, and what the first step takes above the floor."""
    first: list[dict[str, float]] = []
    references: list[dict[str, float]] = []
    restarts: list[float] = []
    with tempfile.TemporaryDirectory(prefix="colonnade-start-") as folder:
        for number in range(rounds):
            references.append(torchrun(Path(folder)))
            first.append(first_step(Path(folder) / f"first-{number}"))
            restarts.append(restart(Path(folder) / f"restart-{number}"))
    report: dict[str, Any] = {f"first step, {part} s": median_of(first, part) for part in first[0]}
    report |= {f"torchrun, {part} s": median_of(references, part) for part in references[0]}
    excess = [
        sum(ours.values()) - theirs["imports"] - theirs["process group"]
        for ours, theirs in zip(first, references, strict=True)
    ]
    report["first step s"] = round(statistics.median(sum(parts.values()) for parts in first), 2)
    report["first step above imports and process group s"] = round(statistics.median(excess), 2)
    report["killed rank to next step s"] = round(statistics.median(restarts), 2)
    return report


def median_of(rounds: list[dict[str, float]], part: str) -> float:
    """Returns the median of a part."""
    return round(statistics.median(parts[part] for parts in rounds), 2)


def torchrun(folder: Path) -> dict[str, float]:
    """Returns the seconds of the reference: imports and process group of its rank 0, and all."""
    script = folder / "group.py"
    script.write_text(GROUP, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    begin = time.perf_counter()
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    imports, group = map(float, done.stdout.split())
    return {"imports": imports, "process group": group, "all": seconds}


def train(run: Path, *words: str) -> "subprocess.Popen[str]":
    """Starts a job of quickstart."""
    command = [sys.executable, "-m", "colonnade.launcher", "train", "quickstart", *FIELDS]
    command += ["--nproc", str(RANKS), "--run", str(run), *words]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )


def first_step(run: Path) -> dict[str, float]:
    """Returns what the start of a job took, part by part."""
    job = train(run, "train.steps=1")
    if status := job.wait():
        raise RuntimeError(f"{run}: the job ended with {status}")
    (parts,) = (e["parts"] for e in read_events(run) if e["event"] == "first step")
    return dict(parts)


def restart(run: Path) -> float:
    """Kills a rank, and returns the seconds to the next step that is completed afterwards."""
    job = train(run, "train.steps=10000", "checkpoint.every=2", "--restarts", "1")
    path = run / METRICS
    wait_for_attempt(path, job, 1, rows=4)
    started = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text(encoding="ascii")
    ranks = [pid for pid in map(int, started.split()) if b"_rank" in command_line(pid)]
    killed = time.time()
    os.kill(ranks[-1], signal.SIGKILL)
    row = wait_for_attempt(path, job, 2, rows=1)
    job.terminate()
    job.wait()
    return row["time"] - killed


def command_line(pid: int) -> bytes:
    """Returns the command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for_attempt(
    path: Path, job: "subprocess.Popen[str]", attempt: int, rows: int
) -> dict[str, Any]:
    """Waits until an attempt has recorded so many steps, and returns the last of these."""
    while job.poll() is None:
        found = read_metrics(path, superseded=True) if path.exists() else []
        of_attempt = [row for row in found if row["attempt"] == attempt]
        if len(of_attempt) >= rows:
            return of_attempt[rows - 1]
        time.sleep(0.02)
    raise RuntimeError(f"{path}: the job ended with {job.returncode} before attempt {attempt}")
