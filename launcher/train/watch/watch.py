"""Opens what lets others watch a run while it trains, and closes it with the run."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.waits import Waits
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.events import Events
from colonnade.launcher.train.lines import write_below
from colonnade.launcher.train.monitor import Monitor
from colonnade.launcher.train.watch.endpoint import Metrics, serving
from colonnade.launcher.train.watch.heartbeat import Heartbeat, Phase
from colonnade.launcher.train.watch.ranks import Comparison, RankTimes
from colonnade.launcher.train.watch.starts import Place, device_text, record_start
from colonnade.parallel.world import World

if TYPE_CHECKING:
    from colonnade.launcher.train.job import Job


class Watch:
    """What lets others watch a run, on one rank; nothing, unless `watching` made it.

    Attributes:
        events: of the run, which know the completed steps.
        heartbeat: of rank 0.
        metrics: that rank 0 serves, if it does.
        ranks: compares working times; None: nothing does.
        hosts: of all ranks.
    """

    def __init__(self, events: Events | None = None, hosts: Sequence[str] = ()) -> None:
        self.events, self.hosts = events or Events(), hosts
        self.heartbeat: Heartbeat | None = None
        self.metrics: Metrics | None = None
        self.ranks: RankTimes | None = None

    @property
    def waits(self) -> Waits:
        """What measures the waits of a step."""
        return self.ranks.waits if self.ranks else Waits()

    def beat(self, phase: Phase = "train") -> None:
        """Writes the heartbeat on rank 0."""
        if self.heartbeat is not None:
            self.heartbeat.beat(self.events.step, phase)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """The block is a phase of its own, after which the run trains."""
        self.beat(phase)
        yield
        self.beat()

    def step_ended(self, job: "Job", monitor: Monitor | None) -> None:
        """Writes the heartbeat after a step, and compares the ranks at the end of a window.
        Collective."""
        self.beat()
        ranks = self.ranks
        if ranks is None or not ranks.due:
            return
        count, comparison = len(ranks.seconds), ranks.compare()

        def report() -> None:
            assert monitor is not None  # on rank 0
            self.report(comparison, ranks.slow, count, monitor)

        on_rank_zero(lambda: write_below(job.run, report))
        if comparison is None:  # as it will be after every window
            self.ranks, job.timer.waits = None, Waits()
        else:
            ranks.slow = comparison.slow

    def report(
        self, comparison: Comparison | None, slow: set[int], count: int, monitor: Monitor
    ) -> None:
        """Records a comparison of `count` steps on rank 0, and names ranks that have become slow or
        are slow no more; `slow` were so before. Raises OSError."""
        if comparison is None:
            monitor.say(
                "the ranks' working times are unknown, and no slow rank is named: the flight "
                "recorder has no times of their collectives (TORCH_NCCL_ENABLE_TIMING=1 and a "
                "TORCH_FR_BUFFER_SIZE that holds those of a step are needed)"
            )
            return
        step = self.events.step
        monitor.record({"step": step} | comparison.row(self.hosts))
        for rank in sorted(comparison.slow - slow):
            seconds, median = comparison.seconds[rank], comparison.median
            monitor.say(
                f"slow rank: rank {rank} on {self.hosts[rank]} works {seconds:.3g} s a step, "
                f"{seconds / median:.1f} times the median of all ranks, {median:.3g} s (steps "
                f"{step - count + 1} to {step}, without waiting for other ranks)"
            )
            self.events.slow_rank(step, rank, self.hosts[rank], seconds, median)
        for rank in sorted(slow - comparison.slow):
            monitor.say(f"rank {rank} on {self.hosts[rank]} is slow no more (step {step})")


@contextmanager
def watching(
    recipe: Recipe, run: Path, world: World, events: Events, command: Sequence[str]
) -> Iterator[Watch]:
    """Records the start of an attempt, and lets others watch the run while the block runs.
    Collective.

    Args:
        recipe: of the run.
        run: its folder.
        world: this rank among all ranks.
        events: of the run, which know the attempt.
        command: the words of the command line that started the job.

    Raises:
        UserError: on all ranks, if metrics cannot be served, or the folder cannot be written to.
    """
    settings = recipe.monitor
    places = on_all_ranks(lambda: Place(socket.gethostname(), device_text(world.device)))
    watch = Watch(events, [place.host for place in places])
    with ExitStack() as opened:

        def open_on_rank_zero() -> None:
            watch.heartbeat = Heartbeat(run, events.attempt)
            watch.beat("start")
            record_start(run, events.attempt, command, places)
            if settings.metrics_port is not None:
                watch.metrics = Metrics(run.absolute().name, recipe.name)
                served = serving(watch.metrics, settings.metrics_host, settings.metrics_port)
                print(f"metrics     {opened.enter_context(served)}", flush=True)

        on_rank_zero(open_on_rank_zero)
        if world.size > 1 and settings.ranks_every:
            watch.ranks = RankTimes(settings, world.device)
            opened.enter_context(watch.waits.measuring())
        try:
            yield watch
        except BaseException:
            watch.beat("failed")
            raise
        watch.beat("stopped")
