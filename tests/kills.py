"""Kills a run at random moments of its saves, starts it again, and compares its losses.

python tests/kills.py --count 50      SIGKILL to the launcher or to a rank, until 50 have hit
python tests/kills.py --count 50 --anywhere optimizer.offload=interleaved

Every start is the same command, `colonnade train … --run DIR`. The run saves after every step, in
a thread; a kill comes a random time after a checkpoint began to be written, or with `--anywhere` a
random time after the last step was written. In the end the losses
of all steps must be those of an undisturbed run, bit for bit, and every checkpoint whole. Exits 1
where they are not.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from colonnade.launcher.checkpoint import folders, verify
from colonnade.launcher.train.metrics import read_metrics

RECIPE = [
    "quickstart", "model.repeat=1", "train.seq_len=64", "train.validate_rows=0", "train.sample=0",
    "train.precision=fp32", "model.hidden=256", "checkpoint.every=1",
]  # fmt: skip
RANKS = 2


def command(run: Path, steps: int, seed: int, fields: list[str]) -> list[str]:
    """Returns the command that makes the run, or goes on with it."""
    overrides = [*RECIPE, f"train.steps={steps}", f"train.seed={seed}", *fields]
    options = ["--nproc", str(RANKS), "--run", str(run)]
    return [sys.executable, "-m", "colonnade.launcher", "train", *overrides, *options]


def children(process: int) -> list[int]:
    """Returns the processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(fields[1]) == process:
            found.append(int(stat.parent.name))
    return found


def kill_while_saving(run: Path, job: subprocess.Popen[str], random: Random) -> str | None:
    """Waits for a checkpoint to begin, and kills a process; returns which, or None if the run
    ended first."""
    skipped = random.randrange(3)  # saves that are left in peace
    while job.poll() is None:
        if partial := next((run / "checkpoints").glob("*.partial"), None):
            if skipped == 0:
                break
            skipped -= 1
            while partial.exists() and job.poll() is None:
                time.sleep(0.001)
        time.sleep(0.0005)
    else:
        return None
    time.sleep(random.random() * 0.1)
    return kill(job, random)


def kill_anywhere(run: Path, job: subprocess.Popen[str], random: Random) -> str | None:
    """Waits for a few steps, and kills a process a random part of a step later."""
    metrics, begun = run / "metrics.jsonl", None
    steps = random.randrange(1, 4)
    while job.poll() is None:
        rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        begun = rows if begun is None else begun
        if rows >= begun + steps:
            time.sleep(random.random() * 0.5)
            return kill(job, random)
        time.sleep(0.002)
    return None


def kill(job: subprocess.Popen[str], random: Random) -> str | None:
    """Kills the launcher or one of its children; returns which, None if it had ended."""
    name, target = random.choice(
        [("launcher", job.pid), *((f"child {n}", pid) for n, pid in enumerate(children(job.pid)))]
    )
    try:
        subprocess.run(["kill", "-9", str(target)], check=True, capture_output=True)
    except subprocess.CalledProcessError:  # it ended meanwhile
        return None
    return name


def losses(run: Path) -> list[tuple[int, float]]:
    """Returns the loss of every step."""
    rows = read_metrics(run / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def disturb(
    run: Path, starting: list[str], random: Random, count: int, anywhere: bool
) -> Counter[str]:
    """Kills a run up to `count` times, until it ends; returns how often which process was hit."""
    hits: Counter[str] = Counter()
    kill_once = kill_anywhere if anywhere else kill_while_saving
    while True:
        job = subprocess.Popen(starting, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
        hit = kill_once(run, job, random) if hits.total() < count else None
        _, errors = job.communicate()
        if hit is not None:
            hits[hit] += 1
            left = [p.name for p in (run / "checkpoints").iterdir()]
            print(f"{hits.total():3} killed {hit:<9} status {job.returncode:4}  {left}", flush=True)
        elif job.returncode == 0:
            return hits
        elif job.returncode not in (-signal.SIGKILL, 1):
            raise SystemExit(f"the run ended with {job.returncode}:\n{errors}")


def main() -> int:
    """Runs disturbed and undisturbed runs until enough kills have hit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--anywhere", action="store_true", help="not only while it saves")
    parser.add_argument("fields", nargs="*", help="overrides of the recipe")
    a = parser.parse_args()
    random, folder, hits = Random(a.seed), Path(tempfile.mkdtemp()), Counter[str]()
    whole = folder / "undisturbed"
    subprocess.run(command(whole, a.steps, a.seed, a.fields), check=True, capture_output=True)
    number = 0
    while hits.total() < a.count:
        run = folder / f"disturbed-{number}"
        number += 1
        starting = command(run, a.steps, a.seed, a.fields)
        hits += disturb(run, starting, random, min(10, a.count - hits.total()), a.anywhere)
        for checkpoint in folders.checkpoints(run / "checkpoints"):
            verify(checkpoint)
        if losses(run) != losses(whole):
            print(f"the losses differ: {run}")
            return 1
    print(f"{dict(hits)}: {number} runs with the losses of an undisturbed one")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
