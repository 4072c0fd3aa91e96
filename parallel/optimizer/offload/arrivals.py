"""Notices when backward has completed a gradient."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn


class Arrivals:
    """Calls `complete` for each parameter whose gradient is complete in the last backward pass of a
    step.

    A gradient may be added to several times within one pass, as where several sub-blocks have one
    weight. How often is learnt in the first step, in which no gradient is complete before its end.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], complete: Callable[[nn.Parameter], None]
    ) -> None:
        self.complete = complete
        self.expected: Counter[nn.Parameter] | None = None
        self.counts: Counter[nn.Parameter] = Counter()
        self.active = False
        self.late: set[nn.Parameter] = set()
        own = weakref.ref(self)  # PyTorch's garbage collection does not see through hooks

        def count(parameter: nn.Parameter) -> None:
            if (arrivals := own()) is not None:
                arrivals.count(parameter)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)

    def leave_out(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leaves out parameters whose gradients are complete only after backward."""
        self.late.update(parameters)

    def begin(self) -> None:
        """Counts from now on: the last backward pass of a step begins."""
        self.active = True
        self.counts.clear()

    def end(self) -> None:
        """Ends the step, whose counts the following ones will have."""
        if self.active and self.expected is None:
            self.expected = Counter(self.counts)
        self.active = False

    def count(self, parameter: nn.Parameter) -> None:
        """Counts an addition to a gradient.

        Raises:
            RuntimeError: the gradient was complete, and may be on its way already.
        """
        if not self.active or parameter in self.late:
            return
        self.counts[parameter] += 1
        if self.expected is None:
            return
        count, expected = self.counts[parameter], self.expected[parameter]
        if count == expected:
            self.complete(parameter)
        elif count > expected > 0:
            raise RuntimeError(
                f"offload: backward added {count} times to a gradient of shape "
                f"{list(parameter.shape)}, and {expected} times in the first step; every step must "
                "use the same parameters"
            )
