"""Finds spikes of the loss, and knows which steps a run passes over because of them.

A step is a spike if its loss or a gradient is not finite, or if its loss is above the median of the
last `guard.window` losses by more than `guard.spike` standard deviations. OLMo-core's
`SkipStepOptimizer` (olmo_core/optim/skip_step_optimizer.py) judges losses by the same number of
losses, 128, and 6 standard deviations. We take median and median absolute deviation in place of
mean and standard deviation, because these have a breakdown point of 50%: neither the fall of the
loss within the window nor an earlier high loss widens the band much (Rousseeuw and Croux,
Alternatives to the median absolute deviation, JASA 88, 1993). Losses below the median are no
spikes. Norms of gradients are not judged, unless they are not finite: clipping bounds their harm.

What follows is PaLM's remedy (arXiv:2204.02311, section 5.1): training goes back to a checkpoint
before the spike and leaves out the batches around it, because spikes came from a batch and a state
of the weights together: the same batches did no harm from another state. PaLM went back about 100
steps, and left out 200 to 500 batches.

**A step that is passed over keeps its number and does nothing**: its samples are not read, no
parameter changes. So learning rate, batch size, samples and random draws of all other steps stay
functions of the step, as without a spike, and what a run computes follows from its recipe and the
numbers of the skipped steps, which every later checkpoint holds, on any number of ranks.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import GuardConfig

DEVIATIONS = 1.4826  # standard deviations of a normal distribution in a median absolute deviation


class Spike(NamedTuple):
    """A step, from 1, whose loss is a spike."""

    step: int
    loss: float
    grad_norm: float

    def describe(self) -> str:
        """Describes it, as the beginning of a sentence."""
        if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            return f"step {self.step}: loss {self.loss:.4f} is a spike"
        return f"step {self.step}: loss {self.loss}, gradient norm {self.grad_norm}: not finite"


@dataclass
class SpikeGuard:
    """The state of the watch on losses, which checkpoints hold; equal on all ranks.

    Attributes:
        losses: the last ones, up to `guard.window`.
        skipped: the steps, from 1, that the run passes over.
        spikes: the steps, from 1, whose loss was a spike.
    """

    losses: list[float] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    spikes: set[int] = field(default_factory=set)

    def observe(self, config: GuardConfig, step: int, loss: float, norm: float) -> Spike | None:
        """Takes the loss and the gradient norm of a step, from 1; returns a spike if it is one."""
        if not config.spike:
            self.losses.clear()
            return None
        if not math.isfinite(loss + norm) or self.is_high(config, loss):
            return Spike(step, loss, norm)
        self.losses = [*self.losses, loss][-config.window :]
        return None

    def is_high(self, config: GuardConfig, loss: float) -> bool:
        """Whether a loss is too far above the last ones, of which there are enough."""
        if len(self.losses) < config.window:
            return False
        middle = median(self.losses)
        deviation = DEVIATIONS * median(abs(one - middle) for one in self.losses)
        return loss - middle > config.spike * deviation

    def skip(self, config: GuardConfig, spike: Spike) -> range:
        """Lets the run pass over the steps before and of a spike; returns them.

        Raises:
            UserError: there were too many spikes shortly before.
        """
        recent = sorted(s for s in self.spikes if abs(s - spike.step) <= config.window)
        if len(recent) >= config.limit:
            raise UserError(
                f"{spike.describe()}, after {len(recent)} others within guard.window = "
                f"{config.window} steps ({', '.join(map(str, recent))}), so the run stops "
                f"(guard.limit = {config.limit}). Look at the data of these steps, lower "
                "optimizer.lr, or raise guard.skip or guard.spike, then resume"
            )
        steps = range(max(spike.step - config.skip, 0) + 1, spike.step + 1)
        self.skipped.update(steps)
        self.spikes.add(spike.step)
        return steps

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it; nothing where the guard is off and nothing was
        skipped."""
        parts: dict[str, Iterable[float]] = {
            "losses": self.losses,
            "skipped": sorted(self.skipped),
            "spikes": sorted(self.spikes),
        }
        return {name: list(values) for name, values in parts.items() if values}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "SpikeGuard":
        """Returns the guard with the state of a checkpoint."""
        known = {name: set(state.get(name, ())) for name in ("skipped", "spikes")}
        return cls(list(state.get("losses", ())), **known)
