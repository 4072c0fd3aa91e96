"""What training, checkpoints and resumption see of an optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
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
    """An update rule and its state, whole from the start, so that a checkpoint always has it.

    `observers` are called at the beginning of every step, when gradients are complete and clipped.
    """

    def __init__(self) -> None:
        self.observers: list[Callable[[], None]] = []

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient at this learning rate. Collective."""
        for observe in self.observers:
            observe()
        self.update(lr)

    @abstractmethod
    def update(self, lr: float) -> None:
        """The update itself. Collective: Muon all-gathers its momentum."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop all gradients."""

    @abstractmethod
    def named_state(self) -> dict[str, Tensor]:
        """State tensors as `PARAMETER.STATE`, sharded as the parameter is."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Updates so far, on which bias corrections depend; skipped steps do not count."""

    @updates.setter
    @abstractmethod
    def updates(self, count: int) -> None: ...
