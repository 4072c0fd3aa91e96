"""The pool of ranks that all tests share: an interrupted call's answer reaches nobody else."""

import _thread
import signal
import threading
import time

import pytest
from ranks import RankError, Ranks


def slowly(rank: int, size: int, seconds: float, answer: str) -> str:
    time.sleep(seconds)
    return answer


def test_an_interrupted_call_answers_nobody() -> None:
    ranks = Ranks(1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        assert ranks.run(slowly, 0.0, "first") == ["first"]
        threading.Timer(0.5, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            ranks.run(slowly, 2.0, "old")
        assert ranks.run(slowly, 3.0, "new") == ["new"]
        with pytest.raises(RankError, match="still running"):
            ranks.run(slowly, 20.0, "old", limit=0.5)
        assert ranks.run(slowly, 0.0, "last") == ["last"]
    finally:
        signal.signal(signal.SIGINT, before)
        ranks.close()


def test_an_answer_to_another_question_is_refused() -> None:
    ranks = Ranks(1)
    try:
        ranks.run(slowly, 0.0, "first")
        (connection,) = ranks._connections
        connection.send((17, ["."]))
        connection.send_bytes(b"nothing that can be unpickled")
        with pytest.raises(RankError, match="answered call 17, not 2"):
            ranks.run(slowly, 0.0, "second")
    finally:
        ranks.close()
