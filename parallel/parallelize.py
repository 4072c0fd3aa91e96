"""The one place that applies parallelism to a model."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from colonnade.models.blocks.base import local_conv
from colonnade.models.blocks.experts import ExpertBlock
from colonnade.models.decoder import Decoder
from colonnade.models.mtp import Predictor
from colonnade.models.parameter_module import ParameterModule, freeze
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.context.plug import context_parallel
from colonnade.parallel.experts import expert_parallel
from colonnade.parallel.mesh import expert_weights_mesh, weights_mesh
from colonnade.parallel.recompute import recompute
from colonnade.parallel.seams import expert_blocks, sub_blocks
from colonnade.parallel.stash import Stash
from colonnade.parallel.tensor import tensor_parallel, wait

Forward = Callable[..., Any]
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def storage_dtype(precision: str) -> torch.dtype:
    """Dtype of parameters and optimizer state at rest; with `optimizer.offload` that of master
    weights."""
    return torch.float64 if precision == "fp64" else torch.float32


class TrainSettings(Protocol):
    """What `parallelize` reads of `[train]`."""

    @property
    def precision(self) -> str: ...
    @property
    def recompute(self) -> str: ...
    @property
    def offload_inputs(self) -> bool: ...
    @property
    def compile(self) -> bool: ...
    @property
    def freeze(self) -> Sequence[str]: ...


class OptimizerSettings(Protocol):
    """What `parallelize` reads of `[optimizer]`."""

    @property
    def offload(self) -> str: ...


class Settings(Protocol):
    """What `parallelize` reads of a recipe."""

    @property
    def train(self) -> TrainSettings: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def optimizer(self) -> OptimizerSettings: ...


def parallelize(
    model: Decoder, mesh: DeviceMesh, recipe: Settings, expert_mesh: DeviceMesh | None = None
) -> Decoder:
    """Applies all parallelism of a recipe to a model built on meta; `materialise` it afterwards.

    The order is fixed: recomputation wraps the halves, then tensor parallelism shards widths over
    the `tp` axis, expert parallelism experts over `ep` and `etp`, context parallelism sequences
    over `cp`, and FSDP2 weights over the data axes and `cp`, those of experts over `edp`. Both
    halves of a sub-block are one FSDP2 group in the compute dtype; norms, routers and decay rates
    stay in the root group in the storage dtype. One rank in fp32 or fp64 needs no FSDP2.

    Args:
        mesh: the dense view.
        expert_mesh: the expert view; None where tp shards experts like other weights.

    Raises:
        ValueError: the recipe needs an expert view, and there is none.
    """
    precision = recipe.train.precision
    model.to(storage_dtype(precision))
    if recipe.optimizer.offload != "none":
        narrow_weights(model, COMPUTE[precision])
    if recipe.parallel.folds_experts != (expert_mesh is not None):
        raise ValueError("parallel.ep and parallel.etp need the mesh of `build_expert_mesh`")
    inner = mesh["tp"].size() * mesh["cp"].size()
    stash = Stash() if recipe.train.offload_inputs else None
    recompute(model, recipe.train.recompute, inner > 1 or expert_mesh is not None, stash)
    if mesh["tp"].size() > 1:
        tensor_parallel(model, mesh["tp"], recipe.parallel.sequence, expert_mesh is None)
    if expert_mesh is not None:
        expert_parallel(model, expert_mesh, mesh["tp"])
    if mesh["cp"].size() > 1:
        context_parallel(model, mesh["cp"], recipe.parallel)
    freeze(model, recipe.train.freeze)  # parameters are DTensors by now, and not FSDP2's yet
    if recipe.train.compile:
        compile_halves(model)
    weights = weights_mesh(mesh)
    of_experts = weights if expert_mesh is None else expert_weights_mesh(expert_mesh)
    if weights.size() > 1 or of_experts.size() > 1 or precision == "bf16":
        apply_fsdp(model, weights, of_experts, precision, reshard=mesh["pp"].size() == 1)
    return model


def fsdp_groups(model: Decoder) -> Iterator[list[nn.Module]]:
    """Yields the modules whose weights FSDP2 all-gathers together: both halves of each sub-block
    with its experts, and the projection of each multi-token predictor."""
    for _, block in sub_blocks(model):
        experts = [block.experts] if isinstance(block, ExpertBlock) else []
        yield [block.first, *experts, block.second]
    for predictor in model.mtp:
        assert isinstance(predictor, Predictor)
        yield [predictor.join]


def narrow_weights(model: Decoder, dtype: torch.dtype) -> None:
    """Gives the weights that are used in the compute dtype that dtype at rest: an optimizer holds
    their master weights."""
    for modules in [list(model.ends()), *fsdp_groups(model)]:
        for module in modules:
            for p in module.parameters():
                p.data = p.data.to(dtype)


def keep_wide_gradients(model: Decoder, dtype: torch.dtype) -> None:
    """Makes FSDP2 leave the gradients of 16-bit weights as they were reduced, in `dtype`: by itself
    it rounds them to the dtype of the weights."""

    def widen(group: Any) -> None:
        init_dtypes = group._init_mp_dtypes  # FSDP2 calls it before its first pass, and others

        def init() -> None:
            init_dtypes()
            group._orig_dtype = dtype

        group._init_mp_dtypes = init

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                widen(group)
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.grad_dtype = dtype


def compile_halves(model: Decoder) -> None:
    """Compiles every half by itself, so that the collectives launched between halves stay outside
    the graphs.

    FSDP2's hooks, which all-gather weights, stay outside as well. So do the seams: they hold
    collectives, or by default kernels that a compiler could only unroll.
    """
    for half in (half for group in fsdp_groups(model) for half in group):
        assert isinstance(half, ParameterModule)
        if half.compiled is None:
            continue
        for name in (seam.name for seam in half.seams or ()):
            if getattr(half, name) is not local_conv:  # a single operator
                setattr(half, name, torch.compiler.disable(getattr(half, name)))
        setattr(half, half.compiled, compiled_in_training(half, getattr(half, half.compiled)))


def compiled_in_training(half: ParameterModule, eager: Forward) -> Forward:
    """A method of a half, compiled in training.

    In evaluation it runs uncompiled: validation would need one more graph, and generation, whose
    caches grow with every token, a new graph for every token.
    """
    compiled = torch.compile(eager)

    def forward(*inputs: Any) -> Any:
        if not half.training:
            return eager(*inputs)
        advance_states(half)
        # Compiled graphs wait for neither their input nor the gradient of their output.
        outputs = compiled(*tree_map_only(AsyncCollectiveTensor, wait, inputs))
        return wait(outputs) if isinstance(outputs, Tensor) else outputs

    return forward


def advance_states(half: ParameterModule) -> None:
    """Advances, outside the graph, every state that the next use of its weight would advance.

    Recomputation does not advance states, so its hooks must not see what this saves for backward.
    """
    with torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: t):
        for name in half.due | (half.transformed - half.started):
            half.weight_of(name)
            half.due.discard(name)
            half.started.add(name)


def apply_fsdp(
    model: Decoder, mesh: DeviceMesh, of_experts: DeviceMesh, precision: str, reshard: bool
) -> None:
    """Applies FSDP2 over meshes of one dimension, or HSDP over those of two.

    Weights are all-gathered in the compute dtype, and gradients reduce-scattered as sums, in at
    least fp32; under HSDP they are also all-reduced over `dp_replicate`. The weights of experts are
    in the group of their sub-block, or, where their mesh is another one, in a group of their own.
    Without `reshard`, as in a pipeline, weights stay gathered after forward.
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
    for group in [ends] if model.config.tied and ends else [[end] for end in ends]:
        # Backward begins with the head: its weight, which may be the embedding's, is not resharded.
        has_head = model.has_head and model.head in group
        keep = has_head or not reshard
        fully_shard(group, mesh=mesh, mp_policy=compute, reshard_after_forward=not keep)
    place = expert_placement(model, of_experts.shape[-1])
    options: dict[str, Any] = {
        "mp_policy": compute,
        "shard_placement_fn": place,
        "reshard_after_forward": reshard,
    }
    if of_experts is not mesh:
        for block in expert_blocks(model):
            fully_shard(block.experts, mesh=of_experts, **options)
    for group in fsdp_groups(model):
        unsharded = [module for module in group if not isinstance(module, FSDPModule)]
        fully_shard(unsharded, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, mp_policy=policy(storage))
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the loss is already divided by the global token count
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def expert_placement(model: Decoder, ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Returns the function that tells FSDP2 along which dimension to shard a parameter: None, which
    is dimension 0, for all but the weights of experts.

    FSDP2 pads dimension 0 to a multiple of the ranks, and a rank may have far fewer experts than
    there are ranks. So theirs is the first dimension that the ranks divide, if there is one.
    """
    of_experts = {id(p) for block in expert_blocks(model) for p in block.experts.parameters()}

    def place(p: nn.Parameter) -> Shard | None:
        shape = p.to_local().shape if isinstance(p, DTensor) else p.shape
        dims = range(p.dim()) if id(p) in of_experts else ()
        return next((Shard(dim) for dim in dims if shape[dim] % ranks == 0), None)

    return place


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


def keep_weights(model: Decoder) -> None:
    """Makes FSDP2 keep all-gathered weights and sum gradients unsharded in the backward passes that
    follow, until `reduce_gradients`."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(False)
        model.set_reshard_after_backward(False)
        model.set_requires_gradient_sync(False)


def sum_gradients(model: Decoder) -> None:
    """Adds gradients that were computed outside of a backward pass to those that FSDP2 has summed,
    in at least fp32: by itself it does so at the end of the next pass, and until then sums in the
    dtype of the weights."""
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._root_post_backward_final_callback()


def reduce_gradients(model: Decoder) -> None:
    """Reduce-scatters the gradients that FSDP2 has summed since `keep_weights`, all-reduces them
    over HSDP's replicas, and frees all-gathered weights. Collective.

    Gradients may have been added after the last backward pass, so it calls what FSDP2 does at the
    end of a pass by itself, as the pipelines of PyTorch do.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(True)
        model.set_reshard_after_backward(True)
        model.set_requires_gradient_sync(True)
        sum_gradients(model)
