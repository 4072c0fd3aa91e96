"""Signals: which are recorded, what is printed, and that handlers and threads are removed."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from colonnade.launcher.cluster.ranks import torchrun_agent
from colonnade.launcher.cluster.signals import SAVE_FIRST, stop_signal

# A run that never comes to the end of its step. It is a process that gets signals from outside:
# `signal.raise_signal` leaves the handlers to Python.
STUCK = """
import sys, time
from colonnade.launcher.cluster.signals import stop_signal
with stop_signal(1, announce=True) as stop:
    print("ready", flush=True)
    while sys.argv[1] == "stuck" or not stop.number:
        time.sleep(0.01)
sys.exit(stop.number)
"""


# The process that started the tests may ignore SIGHUP, and would pass that on.
DEFAULT_SIGHUP = "env", "--default-signal=HUP"


def start(how: str, *prefix: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*(prefix or DEFAULT_SIGHUP), sys.executable, "-c", STUCK, how],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SAVE_FIRST)
def test_each_signal_is_recorded_and_announced(number: signal.Signals) -> None:
    process = start("waiting")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == number
    assert f"{number.name}: stopping (a run after its step, saved)" in err


def test_a_second_ctrl_c_ends_at_once() -> None:
    """A SIGINT that a launcher forwards a moment later counts as the same Ctrl-C."""
    process = start("stuck")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "ended at once, without saving" in err


def test_sighup_stays_ignored_under_nohup() -> None:
    process = start("waiting", "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == signal.SIGTERM


def test_ctrl_c_stops_a_process_in_the_background() -> None:
    """A shell without job control starts background processes with SIGINT ignored."""
    process = start("waiting", "env", "--ignore-signal=INT")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == signal.SIGINT


def test_handlers_and_threads_are_gone_afterwards() -> None:
    """Else a later Ctrl-C would raise torchrun's exception, in a test session too."""
    numbers = (*SAVE_FIRST, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in numbers]
    threads = os.environ.get("OMP_NUM_THREADS")
    with stop_signal(1, announce=True):
        assert signal.getsignal(signal.SIGINT) is not handlers[0]
    with torchrun_agent(2):
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as torchrun does with a handler of its own
        assert signal.getsignal(signal.SIGINT) is not handlers[0]
    assert [signal.getsignal(number) for number in numbers] == handlers
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert "signals" not in {thread.name for thread in threading.enumerate()}


def test_an_agent_raises_only_the_first_signal() -> None:
    """It ends the wait for the ranks to finish; a second would end the wait for them to save."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    with torchrun_agent(2):
        with pytest.raises(SignalException) as raised:
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.sigval == signal.SIGUSR1
