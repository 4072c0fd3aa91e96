"""The order in which a ladder launches all-to-alls, waits for them, and runs halves meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import Ranks
from test_data_parallel import recipe_for
from test_expert_parallel import SMALL
from test_tensor_parallel import rows
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.launcher.train.job import build_model
from colonnade.models.blocks.base import SubBlock
from colonnade.parallel.passes import forward
from colonnade.parallel.seams import sub_blocks
from colonnade.parallel.world import World


class Mark(torch.autograd.Function):
    """The identity, whose backward appends a word to a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str], word: str) -> Tensor:
        ctx.append = lambda: events.append(word)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.append()
        return grad, None, None


class AllToAlls(TorchDispatchMode):
    """Appends `launch` and `wait` to a list for every all-to-all of rows."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events, self.in_flight = events, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if "all_to_all_single" in str(func) and args[0].is_floating_point():
            self.in_flight.add(result.data_ptr())
            self.events.append("launch")
        return result

    def waited(self, wait: Callable[[AsyncCollectiveTensor], Tensor]) -> Any:
        """A method of asynchronous tensors that waits, in which the first wait is an event."""

        def call(tensor: AsyncCollectiveTensor) -> Tensor:
            if tensor.elem.data_ptr() in self.in_flight:
                self.in_flight.remove(tensor.elem.data_ptr())
                self.events.append("wait")
            return wait(tensor)

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, all-to-alls and waits for them are events."""
        cls = AsyncCollectiveTensor
        with (
            self,
            patch.object(cls, "trigger_wait", self.waited(cls.trigger_wait)),
            patch.object(cls, "wait", self.waited(cls.wait)),
        ):
            yield


def watch(block: SubBlock, name: str, events: list[str]) -> None:
    """Makes a sub-block append its calls, and backward the ends of its halves, to a list."""

    def watched(method: Callable[..., Any], word: str) -> Callable[..., Any]:
        def call(first: Any, *args: Any) -> Any:
            if isinstance(first, Tensor) and word == "first":
                first = Mark.apply(first, events, f"first {name} ends")
            events.append(f"{word} {name}")
            result = method(first, *args)
            if isinstance(result, Tensor):
                result = Mark.apply(result, events, f"second {name} begins")
            return result

        return call

    block.begin = watched(block.begin, "first")  # type: ignore[method-assign]
    block.finish = watched(block.finish, "second")  # type: ignore[method-assign]


def order_of_events(rank: int, size: int, residual: str, layout: dict[str, int]) -> list[str]:
    world = World(rank, size, torch.device("cpu"))
    recipe = recipe_for("*E*E", layout, 2, **SMALL, residual=residual)
    _, model, _ = build_model(recipe, world)
    events: list[str] = []
    for t, (_, block) in enumerate(sub_blocks(model)):
        watch(block, f"{block.card.symbol}{t}", events)
    with AllToAlls(events).watching():
        loss, _ = forward(model, rows(), [0, 1], world.device)
        events.append("backward")
        loss.backward()
    return events


LADDER_FORWARD = (
    """
first *0, first E1, launch, second *0, second E1, wait, launch, first *2, wait,
first E3, launch, second *2, second E3, wait, launch, wait
""".replace("\n", " ")
    .strip()
    .split(", ")
)


@pytest.mark.parametrize("layout", [{"ep": 2}, {"ep": 2, "tp": 2, "etp": 1}], ids=str)
def test_a_ladder_runs_a_half_behind_every_exchange(ranks2: Ranks, layout: dict[str, int]) -> None:
    """All but the way back of the last mixture, behind which there is nothing to run."""
    for events in ranks2.run(order_of_events, "ladder", layout):
        split = events.index("backward")
        assert events[:split] == LADDER_FORWARD
        backward = events[split + 1 :]
        # Backward launches the gradient of a way back, and waits for it, around the first half of
        # the attention behind it; that of a dispatch around the second half of the one before it.
        assert (
            backward
            == """
launch, wait, launch, second *2 begins, wait, first E3 ends, launch, first *2 ends, wait, launch,
second *0 begins, wait, first E1 ends, first *0 ends
""".replace("\n", " ")
            .strip()
            .split(", ")
        )


def test_the_standard_residual_hides_none(ranks2: Ranks) -> None:
    """There is no other work between a launch and its wait: no half runs."""
    for events in ranks2.run(order_of_events, "standard", {"ep": 2}):
        launches = [n for n, event in enumerate(events) if event == "launch"]
        assert len(launches) == 8
        assert all(events[n + 1] in ("wait", "second E1", "second E3") for n in launches)
