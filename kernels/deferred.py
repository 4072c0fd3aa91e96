"""Weight gradients computed after backward: zero-bubble pipelines fill idle time with them.

Within `deferring`, products with weights put the gradient of their weight off: backward computes
the gradients of inputs alone, and `DeferredGradients.compute` those of weights. PyTorch's own split
of a graph walks it twice, and runs `backward` of an autograd function as a whole in both walks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class DeferredGradients:
    """The gradients of weights that one backward pass has put off.

    Attributes:
        pending: each weight as it is used, with the graph from its parameters, and a function that
            returns its gradient. The function holds the inputs and the gradient of a product.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def compute(self) -> None:
        """Computes all of them, and adds them to the gradients of parameters.

        Weights of one autograd node, such as the experts of a layer, go together: each by itself
        would get a gradient of the whole layer.
        """
        groups: dict[object, list[tuple[Tensor, Callable[[], Tensor]]]] = defaultdict(list)
        for weight, gradient in self.pending:
            groups[weight.grad_fn or id(weight)].append((weight, gradient))
        self.pending.clear()
        while groups:
            _, group = (
                groups.popitem()
            )  # frees inputs and gradients of its products when it is done
            weights = [weight for weight, _ in group]
            with torch.no_grad():
                gradients = [gradient() for _, gradient in group]
            torch.autograd.backward(weights, gradients)


class PutOff(NamedTuple):
    """Puts off the gradient of one weight; a product calls it in its backward."""

    weight: Tensor
    gradients: DeferredGradients

    def __call__(self, gradient: Callable[[], Tensor]) -> None:
        self.gradients.pending.append((self.weight, gradient))


_active: list[DeferredGradients] = []  # those of the `deferring` contexts that are entered


@contextmanager
def deferring(gradients: DeferredGradients | None) -> Iterator[None]:
    """A context manager: products put the gradients of their weights off into `gradients`.

    Forward and backward of a pass both run within it, because backward may run parts of forward
    again. None puts nothing off.
    """
    if gradients is None:
        yield
        return
    _active.append(gradients)
    try:
        yield
    finally:
        _active.pop()


def put_off(weight: Tensor, *inputs: Tensor | None) -> tuple[Tensor, PutOff | None]:
    """Returns the weight to use in a product with these inputs, and what puts its gradient off.

    Outside of `deferring` that is the weight itself, and None. Within, it is the weight without its
    graph, so that backward of the product ends at the inputs; where none of these requires a
    gradient, backward would not reach the product, and nothing is put off.
    """
    if not _active or not weight.requires_grad or not torch.is_grad_enabled():
        return weight, None
    if not any(x is not None and x.requires_grad for x in inputs):
        return weight, None
    return weight.detach(), PutOff(weight, _active[-1])
