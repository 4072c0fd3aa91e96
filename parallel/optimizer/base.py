"""The interface of an optimizer that training, checkpoints and resumption use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor


class OptimizerSettings(Protocol):
    """What optimizers read of `[optimizer]`."""

    @property
    def name(self) -> str: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def momentum(self) -> float: ...


class Optimizer(ABC):
    """An update rule and its state, all of which exists from the start, so that every checkpoint
    has it.

    `step_pre_hooks` are called at the beginning of every step, when gradients are reduced and
    clipped. `updates` counts the updates so far, without skipped steps; bias corrections depend on
    it.
    """

    def __init__(self) -> None:
        self.step_pre_hooks: list[Callable[[], None]] = []
        self.updates = 0

    def step(self, lr: float) -> None:
        """Updates every parameter from its gradient at this learning rate. Collective."""
        for hook in self.step_pre_hooks:
            hook()
        self.update(lr)
        self.updates += 1

    def resume(self, updates: int, before: Mapping[str, int]) -> None:
        """Goes on after so many updates; `before` has by name how many of them came before the
        state of a parameter began, because it was frozen, where there are any."""
        self.updates = updates

    @abstractmethod
    def update(self, lr: float) -> None:
        """The update itself. Collective: Muon all-gathers its momentum."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Drops all gradients."""

    @abstractmethod
    def named_state(self) -> dict[str, Tensor]:
        """State tensors by `PARAMETER.STATE`, each sharded like its parameter."""
