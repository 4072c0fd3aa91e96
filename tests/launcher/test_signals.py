"""Signals: which are noted, what is told of them, and that nothing of a launcher stays behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from colonnade.launcher.cluster.ranks import as_agent
from colonnade.launcher.cluster.signals import SAVE_FIRST, stop_signal

# A run that never comes to the end of its step; `raise_signal` leaves the handlers to Python.
STUCK = """
import sys, time
from colonnade.launcher.cluster.signals import stop_signal
with stop_signal(1, answers=True) as stop:
    print("ready", flush=True)
    while sys.argv[1] == "stuck" or not stop.number:
        time.sleep(0.01)
sys.exit(stop.number)
"""


HEARD = "env", "--default-signal=HUP"  # whatever started the tests ignores


def started(how: str, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*(before or HEARD), sys.executable, "-c", STUCK, how],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SAVE_FIRST)
def test_each_signal_is_noted_and_told(number: signal.Signals) -> None:
    process = started("waiting")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == number
    assert f"{number.name}: stopping (a run after its step, saved)" in err


def test_a_second_ctrl_c_ends_at_once() -> None:
    """A signal that a launcher passes on a moment later is the same one."""
    process = started("stuck")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "ended at once, without saving" in err


def test_what_nohup_ignores_stays_ignored() -> None:
    process = started("waiting", "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == signal.SIGTERM


def test_ctrl_c_is_heard_in_the_background() -> None:
    """A shell without job control starts what runs in the background with SIGINT ignored."""
    process = started("waiting", "env", "--ignore-signal=INT")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == signal.SIGINT


def test_handlers_and_threads_are_gone_afterwards() -> None:
    """Else Ctrl-C would be an ordinary exception of whatever comes next, a test session too."""
    numbers = (*SAVE_FIRST, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    threads = os.environ.get("OMP_NUM_THREADS")
    with stop_signal(1, answers=True):
        assert signal.getsignal(signal.SIGINT) is not before[0]
    with as_agent(2):
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as torchrun does with a handler of its own
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in numbers] == before
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert "signals" not in {thread.name for thread in threading.enumerate()}


def test_an_agent_hears_a_signal_once() -> None:
    """The first ends its wait for the ranks' end; a second would end the wait for their saving."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    with as_agent(2):
        with pytest.raises(SignalException) as told:
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    assert told.value.sigval == signal.SIGUSR1
