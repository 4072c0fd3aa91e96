"""The one place that applies parallelism to a model."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only

from colonnade.models.blocks.base import SubBlock, local_conv
from colonnade.models.decoder import Decoder
from colonnade.models.mtp import Predictor
from colonnade.models.parameter_module import ParameterModule
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.context.plug import context_parallel
from colonnade.parallel.mesh import weights_mesh
from colonnade.parallel.recompute import recompute
from colonnade.parallel.tensor import tensor_parallel

Forward = Callable[..., Any]
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def storage_dtype(precision: str) -> torch.dtype:
    """Dtype of parameters and optimizer state at rest."""
    return torch.float64 if precision == "fp64" else torch.float32


class TrainSettings(Protocol):
    """What `parallelize` reads of `[train]`."""

    @property
    def precision(self) -> str: ...
    @property
    def recompute(self) -> str: ...
    @property
    def compile(self) -> bool: ...


class Settings(Protocol):
    """What `parallelize` reads of a recipe."""

    @property
    def train(self) -> TrainSettings: ...
    @property
    def parallel(self) -> ParallelConfig: ...


def parallelize(model: Decoder, mesh: DeviceMesh, recipe: Settings) -> Decoder:
    """Applies all parallelism of a recipe to a model built on meta; `materialise` it afterwards.

    The order is fixed: recomputation wraps the halves, then tensor parallelism shards widths over
    the `tp` axis, context parallelism sequences over `cp`, and FSDP2 weights over the data axes and
    `cp`. Both halves of a sub-block are one FSDP2 group in the compute dtype; norms, routers and
    decay rates stay in the root group in the storage dtype. One rank in fp32 or fp64 needs no
    FSDP2.
    """
    precision = recipe.train.precision
    model.to(storage_dtype(precision))
    recompute(model, recipe.train.recompute, mesh["tp"].size() * mesh["cp"].size())
    if mesh["tp"].size() > 1:
        tensor_parallel(model, mesh["tp"], recipe.parallel.sequence)
    if mesh["cp"].size() > 1:
        context_parallel(model, mesh["cp"], recipe.parallel)
    if recipe.train.compile:
        compile_halves(model)
    weights = weights_mesh(mesh)
    if weights.size() > 1 or precision == "bf16":
        apply_fsdp(model, weights, precision)
    return model


def fsdp_groups(model: Decoder) -> Iterator[list[nn.Module]]:
    """Yields the modules whose weights FSDP2 all-gathers together: both halves of each sub-block,
    and the projection of each multi-token predictor."""
    for wiring in model.wirings():
        for block in wiring.blocks.values():
            assert isinstance(block, SubBlock)
            yield [block.first, block.second]
    for predictor in model.mtp:
        assert isinstance(predictor, Predictor)
        yield [predictor.join]


def compile_halves(model: Decoder) -> None:
    """Compiles the `forward` of every half by itself, so that the collectives launched between
    halves stay outside the graphs.

    FSDP2's hooks, which all-gather weights, stay outside as well. So do the seams: they hold
    collectives, or by default kernels that a compiler could only unroll.
    """
    for group in fsdp_groups(model):
        for half in group:
            assert isinstance(half, ParameterModule)
            for name in (seam.name for seam in half.seams or ()):
                if getattr(half, name) is not local_conv:  # a single operator
                    setattr(half, name, torch.compiler.disable(getattr(half, name)))
            half.forward = compiled_forward(half)


def compiled_forward(half: ParameterModule) -> Forward:
    """The half's `forward`, compiled in training.

    In evaluation it runs uncompiled: validation would need one more graph, and generation, whose
    caches grow with every token, a new graph for every token.
    """
    eager, compiled = half.forward, torch.compile(half.forward)

    def forward(*inputs: Any) -> Any:
        if not half.training:
            return eager(*inputs)
        advance_states(half)
        outputs = compiled(*tree_map_only(AsyncCollectiveTensor, _Wait.apply, inputs))
        return _Wait.apply(outputs) if isinstance(outputs, Tensor) else outputs

    return forward


class _Wait(torch.autograd.Function):
    """Waits for an asynchronous collective, in forward for its result and in backward for that of a
    gradient: compiled graphs wait for neither their input nor the gradient of their output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.wait() if isinstance(grad, AsyncCollectiveTensor) else grad


def advance_states(half: ParameterModule) -> None:
    """Advances, outside the graph, every state that the next use of its weight would advance.

    Recomputation does not advance states, so its hooks must not see what this saves for backward.
    """
    with torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: t):
        for name in half.due | (half.transformed - half.started):
            half.weight_of(name)
            half.due.discard(name)
            half.started.add(name)


def apply_fsdp(model: Decoder, mesh: DeviceMesh, precision: str) -> None:
    """Applies FSDP2 over a mesh of one dimension, or HSDP over one of two.

    Weights are all-gathered in the compute dtype, and gradients reduce-scattered as sums, in at
    least fp32; under HSDP they are also all-reduced over `dp_replicate`.
    """
    # The warning concerns writes into the output of a module. Nothing writes into that of a half.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    storage = storage_dtype(precision)

    def policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=storage, cast_forward_inputs=False
        )

    compute = policy(COMPUTE[precision])
    ends = model.ends()
    for group in [ends] if model.config.tied else [[end] for end in ends]:
        # Backward begins with the head: its weight, which may be the embedding's, is not resharded.
        has_head = model.is_last and model.head in group
        fully_shard(group, mesh=mesh, mp_policy=compute, reshard_after_forward=not has_head)
    for group in fsdp_groups(model):
        fully_shard(group, mesh=mesh, mp_policy=compute)
    fully_shard(model, mesh=mesh, mp_policy=policy(storage))
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the loss is already divided by the global token count
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: Decoder) -> None:
    """Frees the all-gathered weights that a forward pass without backward has left on this rank."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_last_micro_batch(model: Decoder, last: bool) -> None:
    """Tells FSDP2 whether the next backward pass is the step's last.

    Gradients are reduce-scattered after every micro-batch, so that no rank holds unsharded ones;
    under HSDP only the last pass all-reduces them over `dp_replicate`.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
