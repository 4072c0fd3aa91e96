"""Records what happens to a run in events.jsonl, from which its goodput is reckoned.

Every line has `time` (Unix seconds), `event`, `attempt` and `step`. An attempt is one start of the
run; the first has the number 1. The events are

- `start`, and `restart` from a `checkpoint`: the recipe's name, the layout, the host, the device,
  the software, and the `seconds` that building the model and loading the checkpoint took;
- `first step`: the `parts` of the seconds from the start of the job to the end of the attempt's
  first step, as in `launcher.cluster.startup`;
- `save`: the step of the checkpoint, the `blocked_seconds` in which training waited for it, the
  `seconds` until it was complete, and its `bytes`; of the last two what is known;
- `validation`: the loss, and its seconds;
- `stage`: a training stage begins within the attempt: its index, its layout, and the `seconds` that
  building the model and loading the checkpoint of the stage before took;
- `slow_rank`: a rank has become slow (`watch/ranks.py`): the `rank`, its `host`, its working
  `seconds` of a step, and the `median` of all ranks;
- `rewind`: a loss spiked in step `spike` (`guard/spikes.py`), and the run went back to its `step`:
  the `loss`, the steps that are `skipped`, the first and the last of their `samples`, and the
  `seconds` that building the model and loading the checkpoint took;
- `replay`: ranks computed different results (`guard/replay.py`): the `pairs` of ranks, the
  `suspects` among them, their `hosts`, and the first `result` that differs;
- `stop`: its `reason`: `finished`, `until` (the step that was asked for), the name of a signal, or
  `error` with the first line of its `message`.

An attempt that was killed has no `stop`. One that failed before training could start has only that.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from colonnade.launcher.run_files import EVENTS, METRICS
from colonnade.launcher.train.lines import Lines, read_lines, without_nan
from colonnade.launcher.train.metrics import attempt_of, current_rows, read_metrics

STARTS = ("start", "restart")


class Events:
    """Appends events to the file of a run, from any thread. Until it is opened it writes nothing:
    only rank 0 opens it.

    Attributes:
        attempt: the number of this start of the run.
        step: completed steps, for the event of an error.
        begin: when this attempt began, in Unix seconds.
        stopped: its `stop` has been written.
    """

    def __init__(self) -> None:
        self.lines: Lines | None = None
        self.attempt, self.step, self.stopped = 1, 0, False
        self.begin = time.time()

    def open(self, run: Path) -> None:
        """Opens the file in the run's folder, as the next attempt. Raises OSError."""
        self.attempt = next_attempt(run)
        self.lines = Lines(run / EVENTS)

    def add(self, event: str, step: int, **fields: Any) -> None:
        """Appends an event; a number that is not finite is null. Raises OSError."""
        if self.lines is None:
            return
        now = round(time.time(), 3)
        place = {"time": now, "event": event, "attempt": self.attempt, "step": step}
        self.lines.append(place | without_nan(fields))

    def start(self, step: int, checkpoint: str | None, **facts: Any) -> None:
        """Records that training starts after `step` steps, from a checkpoint if there is one."""
        self.step = step
        facts |= {"seconds": round(time.time() - self.begin, 3)}
        if checkpoint is None:
            self.add("start", step, **facts)
        else:
            self.add("restart", step, checkpoint=checkpoint, **facts)

    def save(
        self, step: int, blocked: float, seconds: float | None = None, size: int | None = None
    ) -> None:
        """Records a checkpoint.

        Args:
            step: of the checkpoint.
            blocked: seconds in which training waited for it.
            seconds: until it was complete on the disk; None: not known.
            size: in bytes; None: not known.
        """
        known: dict[str, Any] = {"blocked_seconds": round(blocked, 4)}
        known |= {} if seconds is None else {"seconds": round(seconds, 4)}
        known |= {} if size is None else {"bytes": size}
        self.add("save", step, **known)

    def validation(self, step: int, loss: float, seconds: float) -> None:
        """Records a validation."""
        self.add("validation", step, loss=loss, seconds=round(seconds, 4))

    def stage(self, step: int, index: int, layout: dict[str, int], seconds: float) -> None:
        """Records that a training stage begins after `step` steps."""
        self.add("stage", step, stage=index, layout=layout, seconds=round(seconds, 3))

    def rewind(
        self, step: int, spike: int, loss: float, skipped: range, samples: range, seconds: float
    ) -> None:
        """Records that the run went back to `step`, and passes over some steps."""
        passed = {"skipped": list(skipped), "samples": [samples.start, samples.stop - 1]}
        self.add("rewind", step, spike=spike, loss=loss, **passed, seconds=round(seconds, 3))

    def slow_rank(self, step: int, rank: int, host: str, seconds: float, median: float) -> None:
        """Records that a rank is slow from now on."""
        times = {"seconds": round(seconds, 6), "median": round(median, 6)}
        self.add("slow_rank", step, rank=rank, host=host, **times)

    def stop(self, step: int, reason: str, **fields: Any) -> None:
        """Records why this attempt ends; only the first call counts."""
        if not self.stopped:
            self.stopped = True
            self.add("stop", step, reason=reason, **fields)

    @contextmanager
    def errors_recorded(self) -> Iterator[None]:
        """Records an exception that leaves the block as the reason of the stop, and raises it."""
        try:
            yield
        except KeyboardInterrupt:  # Ctrl-C while no handler of ours is installed
            with suppress(OSError):
                self.stop(self.step, signal.SIGINT.name)
            raise
        except BaseException as error:
            message = str(error).partition("\n")[0] or type(error).__name__
            with suppress(OSError):  # the first error is the one to report
                self.stop(self.step, "error", message=message)
            raise

    def close(self) -> None:
        """Closes the file."""
        if self.lines is not None:
            self.lines.close()
        self.lines = None


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run, in order; none where it has no file of them."""
    return read_lines(run / EVENTS, "event", "time", "step")


def next_attempt(run: Path) -> int:
    """The number of the next start of a run."""
    earlier = read_events(run) + read_metrics(run / METRICS, superseded=True)
    return 1 + max(map(attempt_of, earlier), default=0)


@dataclass(frozen=True)
class Goodput:
    """How the seconds of a run were spent, from its first start to its last event or row.

    Attributes:
        wall: all of them.
        steps: steps of the run as it now is.
        lost: steps that were recorded, and repeated or skipped after a restart or a rewind.
        saves: training waited for checkpoints.
        validation: validations, repeated ones too.
        start_up: from the start of each attempt to that of its first step, and of training stages
            and rewinds.
        stopped: from the last event or row of each attempt to the start of the next, when its
            ranks are connected. It has the step in which an attempt was killed, and attempts that
            failed before training could start.
    """

    wall: float
    steps: float
    lost: float
    saves: float
    validation: float
    start_up: float
    stopped: float

    @property
    def share(self) -> float:
        """The goodput: the share of all seconds that is in steps of the run as it now is."""
        return self.steps / self.wall

    @property
    def other(self) -> float:
        """The seconds that are left: samples of text, reports, and what follows the last step."""
        parts = (self.steps, self.lost, self.saves, self.validation, self.start_up, self.stopped)
        return self.wall - sum(parts)

    def describe(self) -> str:
        """Returns a line of the shares."""
        others = {
            "repeated steps": self.lost,
            "saves": self.saves,
            "validation": self.validation,
            "start-up": self.start_up,
            "stopped": self.stopped,
            "other": max(0.0, self.other),  # times of events are rounded
        }
        shares = ", ".join(f"{name} {part / self.wall:.0%}" for name, part in others.items())
        return f"{self.share:.0%} of {self.wall:,.0f} s; {shares}"


def goodput(events: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Goodput | None:
    """Reckons the goodput of a run: seconds of the steps that count, over seconds in all.

    Seconds in all are from the first start, before the model was built, to the last event or row.
    The seconds of a step that count are those of its row that nothing later has superseded. A step
    whose update was skipped counts, because the run as it now is has it.

    Args:
        events: of the run, in order.
        rows: of its metrics, with those that are superseded.

    Returns:
        None for a run without the event of a start, or of no duration.
    """
    timed = [row for row in rows if "seconds" in row]
    starts = [event for event in events if event["event"] in STARTS]
    times = [(attempt_of(one), one["time"]) for one in (*events, *rows) if "time" in one]
    if not starts or (wall := max(t for _, t in times) - begin_of(starts[0])) <= 0:
        return None
    last: dict[int, float] = {}  # of each attempt
    for attempt, moment in times:
        last[attempt] = max(moment, last.get(attempt, moment))
    first_step: dict[int, float] = {}  # when it began
    for row in timed:
        first_step.setdefault(attempt_of(row), row["time"] - row["seconds"])
    # an attempt that ended before a step has spent what is known of it on starting
    start_up = [first_step.get(s["attempt"], s["time"]) - begin_of(s) for s in starts]
    start_up += [e["seconds"] for e in events if e["event"] in ("stage", "rewind")]
    stopped = [begin_of(after) - last[s["attempt"]] for s, after in pairwise(starts)]
    in_curve = sum(row["seconds"] for row in current_rows(rows) if "seconds" in row)
    return Goodput(
        wall=wall,
        steps=in_curve,
        lost=sum(row["seconds"] for row in timed) - in_curve,
        saves=sum(e["blocked_seconds"] for e in events if e["event"] == "save"),
        validation=sum(e["seconds"] for e in events if e["event"] == "validation"),
        start_up=sum(start_up),
        stopped=sum(stopped),
    )


def begin_of(start: dict[str, Any]) -> float:
    """When an attempt began, in Unix seconds, by its event of the start."""
    return start["time"] - start["seconds"]
