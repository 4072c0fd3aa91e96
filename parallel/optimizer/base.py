"""The interface of an optimizer that training, checkpoints and resumption use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from torch import Tensor, nn


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
    @property
    def offload(self) -> str: ...
    @property
    def pinned(self) -> str: ...
    @property
    def margin(self) -> float: ...
    @property
    def offload_gradients(self) -> str: ...
    @property
    def offload_moments(self) -> str: ...


class Optimizer(ABC):
    """An update rule and its state, all of which exists from the start, so that every checkpoint
    has it.

    `step_pre_hooks` are called at the beginning of every step, when gradients are reduced and not
    clipped yet. `updates` counts the updates so far, without skipped steps; bias corrections depend
    on it. `local_norms` has the norms of this rank's shards of gradients that have left the device.
    """

    def __init__(self) -> None:
        self.step_pre_hooks: list[Callable[[], None]] = []
        self.updates = 0
        self.local_norms: dict[nn.Parameter, Tensor] = {}

    def share_with_stages(  # noqa: B027  # by default nothing depends on it
        self, parameters: Collection[nn.Parameter]
    ) -> None:
        """Says which parameters other stages of a pipeline have copies of: they must be updated
        alike, from gradients that are complete only after backward."""

    def expect_gradients(self) -> None:  # noqa: B027  # by default none is taken
        """Is called before the backward pass, or the reduction, that completes the gradients of
        this step: an optimizer may take each as soon as it is complete."""

    def backward_ended(self) -> None:  # noqa: B027  # by default nothing is prepared
        """Is called when a step's passes have been queued, before its norm is known."""

    def step(self, lr: float, scale: float = 1.0) -> None:
        """Updates every parameter from `scale` times its gradient at this learning rate.
        Collective."""
        for hook in self.step_pre_hooks:
            hook()
        self.update(lr, scale)
        self.updates += 1

    def resume(self, updates: int, before: Mapping[str, int]) -> None:
        """Goes on after so many updates; `before` has by name how many of them came before the
        state of a parameter began, because it was frozen, where there are any."""
        self.updates = updates

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns a parameter's gradient, wherever it is, before the update; None: it has none."""
        return parameter.grad

    def masters(self) -> dict[str, Tensor]:
        """Returns by name the weights that the optimizer holds itself, in a wider dtype or in other
        memory than the model's, each sharded like its parameter: they are what is saved."""
        return {}

    def write_weights(self) -> None:  # noqa: B027  # by default there are none
        """Writes the weights of `masters`, which somebody has changed, into the model."""

    @abstractmethod
    def update(self, lr: float, scale: float) -> None:
        """The update itself. Collective: Muon all-gathers its momentum."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Drops all gradients."""

    @abstractmethod
    def named_state(self) -> dict[str, Tensor]:
        """State tensors by `PARAMETER.STATE`, each sharded like its parameter."""
