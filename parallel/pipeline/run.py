"""The passes of one step, or of one evaluation, of a pipeline on one rank, and their send/recv."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.kernels.deferred import DeferredGradients, deferring
from colonnade.models.wiring import State
from colonnade.parallel.parallelize import sum_gradients
from colonnade.parallel.passes import DeviceInputs, Inputs, Outcome
from colonnade.parallel.pipeline.placement import SPLIT_BACKWARD
from colonnade.parallel.pipeline.schedule import Action
from colonnade.parallel.pipeline.timeline import observe_wait
from colonnade.parallel.tensor import wait

if TYPE_CHECKING:
    from colonnade.parallel.pipeline.pipeline import Pipeline

SENDS = 4  # of one rank that may be under way
Boundary = tuple[Tensor, ...]  # stream, and with ladder the pending output: what stages send on


class Shape(NamedTuple):
    """The shape of a micro-batch: its rows, and the tokens of each; `cached`: in generation."""

    rows: int
    length: int
    cached: bool

    @classmethod
    def of(cls, inputs: Inputs | DeviceInputs) -> "Shape":
        """Returns the shape of these inputs."""
        if isinstance(inputs, Inputs):
            rows, length = inputs.batch.tokens.shape
            return cls(rows, length, cached=False)
        length, rows = inputs.tokens.shape
        return cls(rows, length, cached=inputs.context.cache is not None)


class Graph(NamedTuple):
    """A stage's pass on a micro-batch, between forward and backward."""

    inputs: Boundary
    outputs: Boundary
    deferred: DeferredGradients | None


class Transfer(NamedTuple):
    """Tensors that are being sent or received."""

    tensors: Boundary
    works: list[dist.Work]

    def wait(self) -> Boundary:
        """Waits for the transfer; returns its tensors."""
        for work in self.works:
            work.wait()
        return self.tensors


class Run:
    """The passes of one step, or of an evaluation, on this rank.

    What a stage needs next is kept under (stage, micro-batch) until it is used: `arriving` from
    another rank, `of_local_stages` from another stage of this rank.
    """

    def __init__(
        self,
        pipeline: "Pipeline",
        inputs: Sequence[Inputs | DeviceInputs],
        scale: float,
        training: bool,
    ) -> None:
        self.pipeline, self.model = pipeline, pipeline.model
        self.scale, self.training = scale, training
        self.all_inputs, self.shapes = inputs, [Shape.of(one) for one in inputs]
        self.inputs: dict[int, DeviceInputs] = {}
        self.uses = dict.fromkeys(range(len(inputs)), len(pipeline.local))
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.outputs: dict[tuple[int, int], Boundary] = {}
        self.input_gradients: dict[tuple[int, int], Boundary] = {}
        self.arriving: dict[tuple[str, int, int], Transfer] = {}
        self.of_local_stages: dict[tuple[str, int, int], Boundary] = {}
        self.deferred: dict[tuple[int, int], DeferredGradients] = {}
        self.sending: list[Transfer] = []
        self.outcomes: list[Outcome] = []

    def perform(self, action: Action) -> None:
        """Performs one action of a schedule."""
        stage, number = action.stage, action.micro_batch
        match action.kind:
            case "forward":
                self.forward(stage, number)
            case "backward" | "input gradient":
                self.backward(stage, number)
                if action.kind == "backward":
                    self.compute_weight_gradients(stage, number)
            case "weight gradient":
                self.compute_weight_gradients(stage, number)
            case "send forward":
                self.send(self.outputs.pop((stage, number)), stage + 1)
            case "recv forward":
                self.receive("forward", stage, number, stage - 1)
            case "send backward":
                self.send(self.input_gradients.pop((stage, number)), stage - 1)
            case "recv backward":
                self.receive("backward", stage, number, stage + 1)

    # Passes

    def forward(self, stage: int, number: int) -> None:
        """Runs a stage forward; keeps its graph for backward, and its output for the next stage."""
        inputs = self.inputs_of(number)
        received = () if stage == 0 else self.take("forward", stage, number)
        if self.training:
            for t in received:
                t.requires_grad_()
        state = State(*received) if received else None
        splits = self.training and self.pipeline.parallel.schedule in SPLIT_BACKWARD
        deferred = DeferredGradients() if splits else None
        with deferring(deferred):
            result = self.model(*inputs, state=state, stage=self.pipeline.stages[stage])
        self.release_inputs(number)
        is_last = stage == len(self.pipeline.stages) - 1
        if inputs.labels is None:
            output = result
        else:
            output, report = result
            if isinstance(of_all := self.all_inputs[number], Inputs):
                report = of_all.counted_report(report)
            self.outcomes.append(Outcome(output.detach() if is_last else None, report))
        outputs: Boundary
        if is_last:
            outputs = (output * self.scale,)
        else:
            # A reduction that is still in flight is waited for: what is sent has to be there.
            outputs = tuple(wait(t) for t in output if t is not None)
            self.keep_output(stage, number, detached(outputs))
        if self.training:
            self.graphs[stage, number] = Graph(received, outputs, deferred)
        elif is_last:
            self.outputs[stage, number] = outputs

    def keep_output(self, stage: int, number: int, outputs: Boundary) -> None:
        """Keeps the output of a stage for the next one, or to be sent to it.

        Raises:
            RuntimeError: it is not what the next stage's rank expects.
        """
        expected = self.pipeline.boundary(stage + 1, self.shapes[number])
        if [(t.shape, t.dtype) for t in outputs] != [(t.shape, t.dtype) for t in expected]:
            raise RuntimeError(
                f"stage {stage} of the pipeline returned {described(outputs)}, and the next one "
                f"expects {described(expected)}"
            )
        if stage + 1 in self.pipeline.local:
            self.of_local_stages["forward", stage + 1, number] = outputs
        else:
            self.outputs[stage, number] = outputs

    def backward(self, stage: int, number: int) -> None:
        """Runs a stage backward from the gradients of its output, or of the objective."""
        graph = self.graphs.pop((stage, number))
        is_last = stage == len(self.pipeline.stages) - 1
        gradients = None if is_last else self.take("backward", stage, number)
        with deferring(graph.deferred):
            run_backward(graph.outputs, gradients)
        if graph.deferred is not None:
            self.deferred[stage, number] = graph.deferred
        if stage == 0:
            return
        of_inputs = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in graph.inputs)
        if stage - 1 in self.pipeline.local:
            self.of_local_stages["backward", stage - 1, number] = of_inputs
        else:
            self.input_gradients[stage, number] = of_inputs

    def compute_weight_gradients(self, stage: int, number: int) -> None:
        """Computes the gradients of weights that backward has put off."""
        if (deferred := self.deferred.pop((stage, number), None)) is not None:
            deferred.compute()
            sum_gradients(self.model)

    # Inputs

    def inputs_of(self, number: int) -> DeviceInputs:
        """Returns the integers of a micro-batch, copied to the device at their first use."""
        if number not in self.inputs:
            inputs, device = self.all_inputs[number], self.pipeline.device
            self.inputs[number] = inputs.on(device) if isinstance(inputs, Inputs) else inputs
        return self.inputs[number]

    def release_inputs(self, number: int) -> None:
        """Drops the integers of a micro-batch when the last stage of this rank has run forward."""
        self.uses[number] -= 1
        if not self.uses[number]:
            del self.inputs[number]

    # Transfers

    def take(self, direction: str, stage: int, number: int) -> Boundary:
        """Returns what another stage has computed; waits for it if another rank sends it."""
        key = direction, stage, number
        if key in self.of_local_stages:
            return self.of_local_stages.pop(key)
        with observe_wait(self.pipeline.observer, *key):
            return self.arriving.pop(key).wait()

    def receive(self, direction: str, stage: int, number: int, source: int) -> None:
        """Begins to recv a stage's input, or the gradients of its output, from stage `source`."""
        at = stage if direction == "forward" else source  # the stage whose input it is
        buffers = self.pipeline.boundary(at, self.shapes[number])
        self.arriving[direction, stage, number] = self.transfer(dist.irecv, buffers, source)

    def send(self, tensors: Boundary, to: int) -> None:
        """Begins to send tensors to stage `to`; waits for an earlier send where many are under way,
        whose tensors would stay in memory."""
        self.sending.append(self.transfer(dist.isend, tensors, to))
        if len(self.sending) > SENDS:
            self.sending.pop(0).wait()

    def transfer(self, operation: Any, tensors: Boundary, stage: int) -> Transfer:
        """Launches send/recv of tensors with the rank of another stage."""
        group = self.pipeline.pipeline_group
        peer = dist.get_global_rank(group, self.pipeline.placement.ranks[stage])
        operations = [dist.P2POp(operation, t, peer, group) for t in tensors]
        return Transfer(tensors, dist.batch_isend_irecv(operations))

    def wait_for_sends(self) -> None:
        """Waits until everything has been sent."""
        while self.sending:
            self.sending.pop().wait()


def run_backward(outputs: Boundary, gradients: Boundary | None) -> None:
    """Runs backward from the gradients of outputs, or from a scalar; what requires no gradient, as
    the output of a first stage whose weights are frozen, is left out."""
    pairs = zip(outputs, gradients or [None] * len(outputs), strict=True)
    trained = [(output, gradient) for output, gradient in pairs if output.requires_grad]
    if trained:
        torch.autograd.backward([t for t, _ in trained], [gradient for _, gradient in trained])


def described(tensors: Boundary) -> str:
    """Writes the shapes and dtypes of tensors."""
    return " and ".join(f"{list(t.shape)} in {t.dtype}" for t in tensors)


def detached(tensors: Boundary) -> Boundary:
    """Returns the tensors without their graphs, contiguous, as another stage gets them."""
    return tuple(t.detach().contiguous() for t in tensors)
