"""Ranks wait for a slow rank, and end when their launcher has ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from colonnade.parallel.world import World


def test_ranks_wait_however_late_one_comes() -> None:
    """They wait through the store: no collective is open that could time out.

    They wait twice: each wait has a number in its key.
    """
    store = dist.HashStore()
    early, late = (World(rank, 2, torch.device("cpu"), store) for rank in range(2))
    for _ in range(2):
        waiting = threading.Thread(target=early.wait_for_all, args=(0.01,))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        late.wait_for_all(0.01)
        waiting.join(10)
        assert not waiting.is_alive()


LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
RANK = """
import time
from colonnade.launcher.cluster.ranks import end_with_launcher
end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_rank_ends_with_its_launcher() -> None:
    """A launcher that is killed cannot forward a signal to its ranks."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait(30)
    status = Path(f"/proc/{rank}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    os.kill(rank, signal.SIGKILL)
    raise AssertionError("the rank outlived its launcher")
